"""What passes between the ingress and an agent: a question, and what happens while it is answered.

No pixels: frames travel as small JPEG thumbnails, and only where they were asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from vz_ray.env.task import Task
from vz_ray.env.trajectory import SamplingParams
from vz_ray.serve.client_zoom import ReplayedZoom


@dataclass(frozen=True, slots=True)
class AgentRequest:
    """One request, checked, with its media resolved to what the decoders open.

    Attributes:
        id: Of the request.
        task: What is asked; its texts may hold anything, also a model's special tokens.
        sampling: `max_tokens` counts over all turns.
        max_zooms: Fewer than the agent's own limit, or None.
        thumbnail_size: Pixels of the longest side of the frames that are told; 0 tells only their times.
        version: Weights that must answer; None takes those at hand.
        replayed_zooms: What the client has said to zooms since the question.
        client_side_zooms: Further zooms are the client's to carry out.
    """

    id: str
    task: Task
    sampling: SamplingParams
    max_zooms: int | None = None
    thumbnail_size: int = 0
    version: int | None = None
    replayed_zooms: tuple[ReplayedZoom, ...] = ()
    client_side_zooms: bool = False


@dataclass(frozen=True, slots=True)
class FrameThumbnail:
    """A frame that the model saw.

    Attributes:
        pts_s: Its time in the video, seconds.
        image: `data:` URI of a thumbnail; empty where none was asked for.
    """

    pts_s: float
    image: str = ""


@dataclass(frozen=True, slots=True)
class OverviewEvent:
    """The first look at a video.

    Attributes:
        video: Counted from 0.
        duration_s: Of the video.
        frames: In order.
    """

    video: int
    duration_s: float
    frames: tuple[FrameThumbnail, ...]


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text of a turn.

    Attributes:
        turn: From 0.
        is_answer: Belongs to the answer; else to the reasoning before it.
    """

    turn: int
    text: str
    is_answer: bool


@dataclass(frozen=True, slots=True)
class ZoomStarted:
    """The agent asked for a clip, which is being decoded."""

    turn: int
    video: int
    segment: tuple[float, float]
    fps: float


@dataclass(frozen=True, slots=True)
class ZoomFinished:
    """A zoom has ended.

    Attributes:
        turn: From 0.
        video: Counted from 0.
        segment: Start and end, seconds, as asked for: of a refused zoom they may be reversed, or lie outside
            the video. None where the call could not be read.
        fps: Frames a second; None likewise.
        frames: What was shown; none where the zoom was refused.
        refused: Why it was, in the model's words; else empty.
        reasoning: What the agent had said before.
        seconds: Until the turn was said, and until the clip was there.
    """

    turn: int
    video: int
    segment: tuple[float, float] | None
    fps: float | None
    frames: tuple[FrameThumbnail, ...]
    refused: str
    reasoning: str
    seconds: tuple[float, float]


@dataclass(frozen=True, slots=True)
class RequestCompleted:
    """The end of an episode.

    Attributes:
        text: The answer, or what was said in place of one.
        reasoning: Of the last turn.
        status: As of the trajectory: `answered`, `no_answer`, `truncated`.
        version: Weights that answered.
        prompt_tokens: Given to the model, visual tokens and replies to zooms included.
        completion_tokens: Said by it.
        frames: That it saw.
        zooms: That were carried out.
        seconds: Wall time of the episode.
        gated: The zoom gate took the draft for certain, and there was no zoom.
        tool_call_arguments: Arguments of a zoom that the client is to carry out; there is no answer yet then.
    """

    text: str
    reasoning: str
    status: str
    version: int
    prompt_tokens: int
    completion_tokens: int
    frames: int
    zooms: int
    seconds: float
    gated: bool = False
    tool_call_arguments: str = ""


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """It could not be answered, for a reason that lies in the request.

    Attributes:
        message: For whoever asked; names no path of the server.
        code: As in an OpenAI error body.
        http_status: Of HTTP.
    """

    message: str
    code: str
    http_status: int = 400


AgentEvent: TypeAlias = (
    OverviewEvent | TextDelta | ZoomStarted | ZoomFinished | RequestCompleted | RequestFailed
)
