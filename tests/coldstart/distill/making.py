"""Records of episodes, as far as the rules look at them."""

from __future__ import annotations

from vz_ray.coldstart.distill.studio import GIVEN
from vz_ray.data.record import EpisodeRecord
from vz_ray.data.task import Task
from vz_ray.episode.trajectory import (
    Context,
    EpisodeId,
    RewardParts,
    Status,
    Trajectory,
    Turn,
    Written,
    ZoomFault,
    ZoomRefused,
)
from vz_ray.video.frame import FrameRef, Zoom

REFUSED = ZoomRefused(ZoomFault.REVERSED, "the segment ends before it starts")
LAST = ZoomRefused(ZoomFault.LAST_ROUND, "no zoom is left")


def record(
    *zooms: Zoom | ZoomRefused,
    task: str = "t",
    sample: int = 0,
    right: bool = True,
    question: str = "",
    video: str = "v.mp4",
    content: str = "",
    status: Status = Status.ANSWERED,
    given: int = 0,
    valid: bool = True,
    last: str = "<think>b</think><answer>B</answer>",
    source: str = "",
    error: str = "",
    think: str = "",
) -> EpisodeRecord:
    """An episode with these zooms and an answer; `think` sets its transcript apart."""
    ref = FrameRef(content or f"blake3:{video}", video, 0, 0.0, 28, 28, "s", "d", "0")
    prompt = Context((1, 2), ((1, 2, 2),), (ref,), pad_id=1)
    turns = []
    for zoom in zooms:
        a, b, fps = (zoom.start_s, zoom.end_s, zoom.fps) if isinstance(zoom, Zoom) else (3, 1, 2)
        text = f'<think>{think or sample}</think><video_zoom>{{"segment":[{a},{b}],"fps":{fps}}}</video_zoom>'
        turns.append(Turn(Written(text, (3,)), text, zoom, Context((4,))))
    if status is not Status.NO_ANSWER or not zooms or zooms[-1] is not LAST:
        turns.append(Turn(Written(last, (5,)), last, None, None))
    reward = RewardParts(1.0, float(right), 1.0, 0.0, valid=valid, note="" if valid else "judge timeout")
    trajectory = Trajectory(
        EpisodeId(0, task, sample),
        "clean",
        prompt,
        tuple(turns),
        status,
        reward=None if status is Status.FAILED else reward,
        error=error,
        extra={GIVEN: given},
    )
    return EpisodeRecord(Task(task, video, question or f"What is {task}?", "B", source=source), trajectory)
