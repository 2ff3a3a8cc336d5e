"""A reward of the user's own: `reward.function: package.module:name`.

    def reward(trajectory: Trajectory, task: Task, parts: RewardParts) -> Mapping[str, float]

It is called once for each episode that was played to an end, after the
project's own parts have been found, and returns further parts by name:

- Each is added to the total as it is (weigh it in the function), and is logged
  as `reward/<name>`. Names are lower case, with digits and underscores.
- `accuracy`, in `[0, 1]`, is not added but takes the place of the project's
  own; it is weighted as that is, and makes an episode valid that nobody here
  could judge (`parts.valid` is False for those).
- `raise Invalid("reason")` drops the episode, and its group, as not judged.

Its module is looked for on PYTHONPATH and in the directory that the command is
run in. It runs in the rollout workers, in several threads at once, and must
give the same result for the same episode. `vz-ray check-reward package.module:name`
tries it.

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
RESERVED_NAMES = ("total", "format", "tool", "length", "frames", "judge_score", "valid", "note", "more")
"""Names of the project's own parts."""

RewardFunction = Callable[[Trajectory, Task, RewardParts], Mapping[str, float]]
_NAME = re.compile(r"[a-z][a-z0-9_]*")


class InvalidEpisode(Exception):
    """Raised by a reward function: this episode cannot be judged; the message says why."""


def load_reward_function(path: str) -> RewardFunction:
    """The function that `path` names.

    Raises:
        UserError: There is none, or it does not take three arguments.
    """
    return function_loader.load_function("reward.function", path, ("trajectory", "task", "parts"))


def call_reward_function(
    path: str, trajectory: Trajectory, task: Task, parts: RewardParts
) -> dict[str, float]:
    """The parts that the function found, checked.

    Raises:
        Invalid: The function says so.
        UserError: It raised something else, or returned what is no set of parts.
    """
    function = load_reward_function(path)
    try:
        found = function(trajectory, task, parts)
    except InvalidEpisode:
        raise
    except Exception as error:
        raise UserError(
            f"reward.function {path!r} raised {type(error).__name__}: {error}, on episode {trajectory.id}"
        ) from error
    if trouble := find_violation(found):
        raise UserError(f"reward.function {path!r} on episode {trajectory.id}: {trouble}")
    return {name: float(value) for name, value in found.items()}


def find_violation(found: Any) -> str:
    """What is wrong with what a function returned; empty if nothing is."""
    if not isinstance(found, Mapping):
        return f"returned {type(found).__name__}; it must return a mapping of names to numbers"
    for name, value in found.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            return f"named a part {name!r}; use lower case letters, digits and underscores"
        if name in RESERVED_NAMES:
            return f"named a part {name!r}, which the project has itself; call it something else"
        if isinstance(value, bool) or not _is_number(value):
            return f"returned {value!r} as {name!r}; it must be a number (float(...) of an array's element)"
        if not math.isfinite(value):
            return f"returned {value!r} as {name!r}; it must be finite"
        if name == ACCURACY and not 0 <= value <= 1:
            return f"returned {value!r} as 'accuracy'; it must lie between 0 and 1"
    return ""


def _is_number(value: Any) -> bool:
    """Python's own, or a scalar of numpy."""
    return isinstance(value, int | float) or (
        hasattr(value, "__float__") and getattr(value, "config", None) == ()
    )
