"""Interfaces of an episode: policy, frame source, frame ranker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vz_ray.env.trajectory import ExternalAction, SampledAction, SamplingParams
from vz_ray.video.frame import Clip, ClipRequest, Frame, FrameRef, FrameSize, VideoInfo
from vz_ray.video.frame_selection import SelectionParams


@dataclass(frozen=True, slots=True)
class PromptMessage:
    """One message of the conversation as text, with an image slot for each frame."""

    role: str
    text: str
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """The conversation so far.

    Attributes:
        compact_ids: Token ids with one image pad per image, ready to be continued.
        frames: One frame per image pad, in order.
        messages: The same conversation as messages, for policies without token input.
        in_reasoning: The ids end inside `<think>`. A zoom call before `</think>` does not end the turn.
    """

    compact_ids: tuple[int, ...]
    frames: tuple[Frame, ...]
    messages: tuple[PromptMessage, ...]
    in_reasoning: bool = False


class Policy(Protocol):
    """Model that generates turns: a vLLM engine, a scripted policy or an HTTP API."""

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams, *, request_id: str
    ) -> SampledAction | ExternalAction:
        """Generate one turn. `request_id` is unique per turn and appears in errors."""
        ...


class FrameSource(Protocol):
    """Decoder of videos: the decode pool or a local reader.

    Every method raises `VideoError` if the video cannot be decoded as requested, and `StepTimeout`
    if the source's own timeout expires.
    """

    async def probe(self, uri: str) -> VideoInfo: ...

    async def clip(self, uri: str, request: ClipRequest, size: FrameSize) -> Clip: ...

    async def resolve(self, refs: Sequence[FrameRef]) -> list[Frame]:
        """Decode the referenced frames again, in order. Each is checked against its digest."""
        ...


class FrameRanker(Protocol):
    """Image-text model that selects the frames of a video for a text."""

    async def rank_frames(self, uri: str, question: str, search: SelectionParams) -> tuple[float, ...]:
        """Return the times of the selected frames in seconds, ascending. Deterministic.

        Raises:
            VideoError: The video cannot be decoded.
            StepTimeout: The ranker's own timeout expired.
        """
        ...
