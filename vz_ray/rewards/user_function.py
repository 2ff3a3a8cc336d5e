"""User-defined reward function: `reward.function: package.module:name`.

    def reward(trajectory: Trajectory, task: Task, parts: RewardParts) -> Mapping[str, float]

The scorer calls it for each finished episode, after the built-in parts. It returns additional parts by name:

- Each value is added to the total without a weight and logged as `reward/<name>`. Names consist of lower-case
  letters, digits and underscores.
- `accuracy`, in `[0, 1]`, replaces the built-in accuracy and gets its weight. It also makes an episode valid
  that the built-in scorers could not score (`parts.valid` is False for those).
- `raise InvalidEpisode("reason")` excludes the episode and its group.

The module is imported from PYTHONPATH or the current directory. The function runs in the rollout workers, in
several threads, and must be deterministic. Test it with `vz-ray check-reward package.module:name`.

Example:
    def brevity(trajectory, task, parts):
        words = sum(len(turn.text.split()) for turn in trajectory.turns)
        return {"brevity": 0.1 * parts.accuracy if words < 100 else 0.0}
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from vz_ray.env.task import Task
from vz_ray.env.trajectory import RewardParts, Trajectory
from vz_ray.utils import function_loader
from vz_ray.utils.errors import UserError

ACCURACY = "accuracy"
RESERVED_NAMES = (
    "total",
    "format",
    "tool",
    "length",
    "frames",
    "judge_score",
    "valid",
    "note",
    "extra",
    "turn_rewards",
)
"""Names of the built-in parts and of the fields of `RewardParts`."""

RewardFunction = Callable[[Trajectory, Task, RewardParts], Mapping[str, float]]
_NAME = re.compile(r"[a-z][a-z0-9_]*")


class InvalidEpisode(Exception):
    """Raised by a reward function to exclude an episode that it cannot score. The message is the reason."""


def load_reward_function(path: str) -> RewardFunction:
    """Import the function at `path`.

    Raises:
        UserError: The function does not exist or does not take three arguments.
    """
    return function_loader.load_function("reward.function", path, ("trajectory", "task", "parts"))


def call_reward_function(path: str, trajectory: Trajectory, task: Task, parts: RewardParts) -> dict[str, float]:
    """Call the function at `path` and validate the parts that it returns.

    Raises:
        InvalidEpisode: The function raised it.
        UserError: The function raised another exception or returned invalid parts.
    """
    function = load_reward_function(path)
    try:
        user_parts = function(trajectory, task, parts)
    except InvalidEpisode:
        raise
    except Exception as error:
        raise UserError(
            f"reward.function {path!r} raised {type(error).__name__}: {error}, on episode {trajectory.id}"
        ) from error
    if violation := find_violation(user_parts):
        raise UserError(f"reward.function {path!r} on episode {trajectory.id}: {violation}")
    return {name: float(value) for name, value in user_parts.items()}


def find_violation(user_parts: Any) -> str:
    """Describe the first rule that a return value breaks; empty if it is valid."""
    if not isinstance(user_parts, Mapping):
        return f"returned {type(user_parts).__name__}; it must return a mapping of names to numbers"
    for name, value in user_parts.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            return f"named a part {name!r}; use lower-case letters, digits and underscores"
        if name in RESERVED_NAMES:
            return f"named a part {name!r}, which is reserved for a built-in part; choose another name"
        if isinstance(value, bool) or not _is_number(value):
            return f"returned {value!r} for {name!r}; it must be a number (use float(...) on array elements)"
        if not math.isfinite(value):
            return f"returned {value!r} for {name!r}; it must be finite"
        if name == ACCURACY and not 0 <= value <= 1:
            return f"returned {value!r} for 'accuracy'; it must be between 0 and 1"
    return ""


def _is_number(value: Any) -> bool:
    """Return whether `value` is a Python number or a numpy scalar."""
    return isinstance(value, int | float) or (hasattr(value, "__float__") and getattr(value, "shape", None) == ())
