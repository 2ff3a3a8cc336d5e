"""Minimal episode records for the filters."""

from __future__ import annotations

from vz_ray.data.episode_record import EpisodeRecord
from vz_ray.distill.teacher_runner import PREFIX_TURNS
from vz_ray.env.task import Task
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
from vz_ray.video.frame import FrameRef, ZoomRequest

REJECTED = RejectedZoom(ZoomErrorKind.REVERSED, "the segment ends before it starts")
LAST_ROUND = RejectedZoom(ZoomErrorKind.LAST_ROUND, "no zoom is left")


def make_record(
    *zooms: ZoomRequest | RejectedZoom,
    task: str = "t",
    sample: int = 0,
    correct: bool = True,
    question: str = "",
    video: str = "v.mp4",
    content_hash: str = "",
    status: EpisodeStatus = EpisodeStatus.ANSWERED,
    prefix_turns: int = 0,
    valid: bool = True,
    last_turn: str = "<think>b</think><answer>B</answer>",
    source: str = "",
    error: str = "",
    think: str = "",
) -> EpisodeRecord:
    """Build an episode with the given zooms and an answer; `think` makes its transcript unique."""
    ref = FrameRef(content_hash or f"blake3:{video}", video, 0, 0.0, 28, 28, "s", "d", "0")
    prompt = TokenContext((1, 2), ((1, 2, 2),), (ref,), pad_id=1, merge_size=2)
    turns = []
    for zoom in zooms:
        a, b, fps = (zoom.start_s, zoom.end_s, zoom.fps) if isinstance(zoom, ZoomRequest) else (3, 1, 2)
        text = f'<think>{think or sample}</think><video_zoom>{{"segment":[{a},{b}],"fps":{fps}}}</video_zoom>'
        turns.append(Turn(ExternalAction(text, (3,)), text, zoom, TokenContext((4,))))
    if status is not EpisodeStatus.NO_ANSWER or not zooms or zooms[-1] is not LAST_ROUND:
        turns.append(Turn(ExternalAction(last_turn, (5,)), last_turn, None, None))
    reward = RewardParts(1.0, float(correct), 1.0, 0.0, valid=valid, note="" if valid else "judge timeout")
    trajectory = Trajectory(
        EpisodeId(0, task, sample),
        "clean",
        prompt,
        tuple(turns),
        status,
        reward=None if status is EpisodeStatus.FAILED else reward,
        error=error,
        extra={PREFIX_TURNS: prefix_turns},
    )
    return EpisodeRecord(Task(task, video, question or f"What is {task}?", "B", source=source), trajectory)
