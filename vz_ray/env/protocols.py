"""The two sides an episode is played against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vz_ray.env.trajectory import ExternalAction, SampledAction, SamplingParams
from vz_ray.video.frame import (
    Clip,
    Frame,
    FrameRef,
    FrameSize,
    ImageRequest,
    OverviewRequest,
    SelectedFramesRequest,
    VideoInfo,
    ZoomRequest,
)
from vz_ray.video.frame_selection import SelectionParams


@dataclass(frozen=True, slots=True)
class PromptMessage:
    """One message as people and HTTP APIs see it; `<image>` marks each frame's place."""

    role: str
    text: str
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """Everything the policy has seen so far.

    Attributes:
        compact_ids: The conversation with one pad per image, ready to be continued.
        frames: One per pad, in order.
        messages: The same conversation as messages, for policies without tokens.
    """

    compact_ids: tuple[int, ...]
    frames: tuple[Frame, ...]
    messages: tuple[PromptMessage, ...]


class Policy(Protocol):
    """Whoever plays: a vLLM worker, an oracle, a model behind an HTTP API."""

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams, *, request_id: str
    ) -> SampledAction | ExternalAction:
        """Plays one turn. `request_id` is unique per turn and names it in errors."""
        ...


class FrameSource(Protocol):
    """Whoever has the pixels: the clip pool, or a reader in this process.

    Every method raises `VideoError` if the video cannot be read as asked, and
    `StepTimeout` if it took longer than the source's own deadline.
    """

    async def probe(self, uri: str) -> VideoInfo: ...

    async def overview(
        self, uri: str, request: OverviewRequest | SelectedFramesRequest | ImageRequest, size: FrameSize
    ) -> Clip: ...

    async def zoom(self, uri: str, request: ZoomRequest, size: FrameSize) -> Clip: ...

    async def resolve(self, refs: Sequence[FrameRef]) -> list[Frame]:
        """The same bytes again, in the order asked; checked against each ref's digest."""
        ...


class FrameRanker(Protocol):
    """Whoever knows which frames of a video are like a text: an image-text model."""

    async def rank_frames(self, uri: str, question: str, search: SelectionParams) -> tuple[float, ...]:
        """Seconds of the chosen frames, ascending; the same for the same arguments.

        Raises `VideoError` if the video cannot be read, and `StepTimeout` past its own deadline.
        """
        ...
