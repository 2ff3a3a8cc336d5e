"""Reward functions as users write them, good and bad."""

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


def own_accuracy(trajectory: Trajectory, task: Task, parts: RewardParts) -> Mapping[str, float]:
    """Words in common with the truth: its own idea of accuracy, for any kind of question."""
    said, truth = set((trajectory.answer or "").lower().split()), set(task.answer.lower().split())
    return {"accuracy": len(said & truth) / max(1, len(truth))}


def only_answered(trajectory: Trajectory, task: Task, parts: RewardParts) -> Mapping[str, float]:
    if trajectory.answer is None:
        raise InvalidEpisode("nothing to compare")
    return {"length_of_answer": np.float32(len(trajectory.answer))}


def nothing(trajectory: Trajectory, task: Task, parts: RewardParts) -> Mapping[str, float]:
    return {}


def two_arguments(trajectory: Trajectory, task: Task) -> Mapping[str, float]:
    return {}


def raising(trajectory: Trajectory, task: Task, parts: RewardParts) -> Mapping[str, float]:
    return {"first": float(task.extra["level"])}  # type: ignore[arg-type]


async def waiting(trajectory: Trajectory, task: Task, parts: RewardParts) -> Mapping[str, float]:
    return {}


def returning(value: Any) -> Any:
    """A function that returns `value`."""
    return lambda trajectory, task, parts: value


a_number = returning(1.0)
none = returning(None)
not_finite = returning({"iou": float("nan")})
infinite = returning({"iou": float("inf")})
text = returning({"iou": "1"})
truth_value = returning({"iou": True})
an_array = returning({"iou": np.zeros(2)})
no_name = returning({1: 0.5})
spaced = returning({"my part": 0.5})
upper = returning({"IoU": 0.5})
taken = returning({"format": 0.5})
too_accurate = returning({"accuracy": 1.5})


def restless(trajectory: Trajectory, task: Task, parts: RewardParts) -> Mapping[str, float]:
    return {"calls": float(next(_calls))}


def meddling(trajectory: Trajectory, task: Task, parts: RewardParts) -> Mapping[str, float]:
    task.extra["seen"] = True
    return {}
