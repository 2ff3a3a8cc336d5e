"""Messages between the ingress and an agent replica: a request, and the events of its episode.

Events carry no pixels: frames travel as small JPEG thumbnails, and only on request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from vz_ray.env.task import Task
from vz_ray.env.trajectory import SamplingParams
from vz_ray.serve.client_zoom import ReplayedZoom


@dataclass(frozen=True, slots=True)
class AgentRequest:
    """A validated request. Its media are resolved to URIs that the decoders can open.

    Attributes:
        id: Request id.
        task: Question and videos. Its texts are untrusted and may contain special tokens of the model.
        sampling: Sampling parameters; `max_tokens` is the budget for all turns together.
        max_zooms: Maximum number of zooms; None keeps the agent's own limit.
        thumbnail_size: Longest side of the returned thumbnails, pixels; 0 returns times only.
        version: Weight version that must answer; None accepts the current version.
        replayed_zooms: Zooms since the question that the client has replied to.
        client_side_zooms: Return new zooms to the client as tool calls.
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
    """A frame in the model's context.

    Attributes:
        pts_s: Time in the video, seconds.
        image: `data:` URI of a thumbnail; empty if not requested.
    """

    pts_s: float
    image: str = ""


@dataclass(frozen=True, slots=True)
class OverviewEvent:
    """The overview of one video is decoded.

    Attributes:
        video: Index of the video, from 0.
        duration_s: Duration of the video, seconds.
        frames: Overview frames in order of time.
    """

    video: int
    duration_s: float
    frames: tuple[FrameThumbnail, ...]


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of a turn.

    Attributes:
        turn: Index of the turn, from 0.
        text: The new text.
        is_answer: True for text of the answer, False for reasoning.
    """

    turn: int
    text: str
    is_answer: bool


@dataclass(frozen=True, slots=True)
class ZoomStarted:
    """The agent requested a clip; decoding has started."""

    turn: int
    video: int
    segment: tuple[float, float]
    fps: float


@dataclass(frozen=True, slots=True)
class ZoomFinished:
    """A zoom call was executed or refused.

    Attributes:
        turn: Index of the turn, from 0.
        video: Index of the video, from 0.
        segment: Requested start and end, seconds. A refused segment may be reversed or outside the video.
            None if the call could not be parsed.
        fps: Requested frames per second; None if the call could not be parsed.
        frames: Frames of the clip; empty if the zoom was refused.
        refused: Error message that the model received; empty if the zoom was executed.
        reasoning: Text of the turn before the call.
        seconds: Duration of the generation and of the decoding.
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
    """Last event of a request that was answered.

    Attributes:
        text: The answer. Without an answer, the text of the last turn outside `<think>`, which may be empty.
        reasoning: Reasoning of the last turn.
        status: `answered`, `no_answer` or `truncated`, from the trajectory; `zoom` before a client's zoom.
        version: Weight version that answered.
        prompt_tokens: Tokens given to the model, including visual tokens and observations.
        completion_tokens: Sampled tokens.
        frames: Number of frames in the context.
        zooms: Number of executed zooms.
        seconds: Wall time of the episode.
        gated: The zoom gate accepted the draft answer, so the agent did not zoom.
        tool_call_arguments: Arguments of a zoom for the client to execute; the answer is still open.
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
    """Last event of a request that cannot be answered because of its content.

    Attributes:
        message: Error for the client; contains no path of the server.
        code: Error code of the OpenAI error body.
        http_status: HTTP status.
    """

    message: str
    code: str
    http_status: int = 400


AgentEvent: TypeAlias = OverviewEvent | TextDelta | ZoomStarted | ZoomFinished | RequestCompleted | RequestFailed
