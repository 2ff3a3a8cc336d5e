"""Factories of scored episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from vz_ray.env.task import AnswerType, Task
from vz_ray.env.trajectory import (
    EpisodeId,
    EpisodeStatus,
    ExternalAction,
    RejectedZoom,
    RewardParts,
    TokenContext,
    Trajectory,
    Turn,
    ZoomErrorKind,
)
from vz_ray.eval.eval_log import EvalResult
from vz_ray.video.frame import FrameRef, ZoomRequest

MakeResult = Callable[..., EvalResult]


def frames_at(times: Sequence[float]) -> TokenContext:
    refs = tuple(FrameRef("blake3:v", "v.mp4", 0, time, 28, 28, "bicubic", "av", "00") for time in times)
    return TokenContext((1,) * len(refs), ((1, 2, 2),) * len(refs), refs, pad_id=1, merge_size=2)


@pytest.fixture
def make_result() -> MakeResult:
    """Factory of scored results; `zooms` holds the frame times of each clip, None for a rejected zoom."""

    def result(
        task: str = "t0",
        correct: bool = True,
        overview: Sequence[float] = (0, 10, 20, 30),
        zooms: Sequence[Sequence[float] | None] = ((12.0, 13.0),),
        events: tuple[tuple[float, float], ...] = ((12.5, 14.0),),
        **options: Any,
    ) -> EvalResult:
        turns = []
        for times in zooms:
            zoom = ZoomRequest(12, 14, 1) if times is not None else RejectedZoom(ZoomErrorKind.EMPTY, "empty")
            turns.append(Turn(ExternalAction("z", ()), "z", zoom, frames_at(times or ())))
        turns.append(Turn(ExternalAction("a", ()), "a", None, None))
        valid, note = options.get("valid", True), options.get("note", "")
        trajectory = Trajectory(
            EpisodeId(0, task, 0),
            "clean",
            frames_at(overview),
            tuple(turns),
            options.get("status", EpisodeStatus.ANSWERED),
            answer="A",
            seconds=options.get("seconds", 2.0),
            reward=RewardParts(1.0, float(correct), 1.0, 0.0, valid, note),
        )
        question = Task(
            task,
            options.get("video", f"{task}.mp4"),
            "?",
            "A",
            AnswerType.MULTIPLE_CHOICE,
            kind=options.get("kind", "identify"),
            evidence_spans=events,
        )
        return EvalResult(question, trajectory, stage=options.get("stage", "rl"))

    return result
