"""Valid and invalid reward functions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from vz_ray.env.task import Task
from vz_ray.env.trajectory import RewardParts, Trajectory
from vz_ray.rewards import InvalidEpisode

_calls = itertools.count()
NOT_A_FUNCTION = 3


def brevity(trajectory: Trajectory, task: Task, parts: RewardParts) -> Mapping[str, float]:
    words = sum(len(turn.text.split()) for turn in trajectory.turns)
    return {"brevity": 0.25 * parts.accuracy if words < 100 else 0.0, "turns": -0.1 * len(trajectory.turns)}


def word_overlap_accuracy(trajectory: Trajectory, task: Task, parts: RewardParts) -> Mapping[str, float]:
    """Return the share of the truth's words in the answer as accuracy."""
    answer, truth = set((trajectory.answer or "").lower().split()), set(task.answer.lower().split())
    return {"accuracy": len(answer & truth) / max(1, len(truth))}


def only_answered(trajectory: Trajectory, task: Task, parts: RewardParts) -> Mapping[str, float]:
    if trajectory.answer is None:
        raise InvalidEpisode("nothing to compare")
    return {"answer_chars": np.float32(len(trajectory.answer))}


def no_parts(trajectory: Trajectory, task: Task, parts: RewardParts) -> Mapping[str, float]:
    return {}


def two_arguments(trajectory: Trajectory, task: Task) -> Mapping[str, float]:
    return {}


def raising(trajectory: Trajectory, task: Task, parts: RewardParts) -> Mapping[str, float]:
    return {"first": float(task.extra["level"])}  # type: ignore[arg-type]


async def coroutine_function(trajectory: Trajectory, task: Task, parts: RewardParts) -> Mapping[str, float]:
    return {}


def returning(value: Any) -> Any:
    """Build a function that returns `value`."""
    return lambda trajectory, task, parts: value


number = returning(1.0)
none = returning(None)
not_finite = returning({"iou": float("nan")})
infinite = returning({"iou": float("inf")})
text = returning({"iou": "1"})
boolean = returning({"iou": True})
array = returning({"iou": np.zeros(2)})
non_string_name = returning({1: 0.5})
name_with_space = returning({"my part": 0.5})
uppercase_name = returning({"IoU": 0.5})
reserved_name = returning({"format": 0.5})
accuracy_out_of_range = returning({"accuracy": 1.5})


def nondeterministic(trajectory: Trajectory, task: Task, parts: RewardParts) -> Mapping[str, float]:
    return {"calls": float(next(_calls))}


def mutating(trajectory: Trajectory, task: Task, parts: RewardParts) -> Mapping[str, float]:
    task.extra["seen"] = True
    return {}
