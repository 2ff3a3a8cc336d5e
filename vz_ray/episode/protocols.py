"""The two sides an episode is played against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vz_ray.episode.trajectory import Sampled, Sampling, Written
from vz_ray.video.choice import Search
from vz_ray.video.frame import Chosen, Clip, Frame, FrameRef, FrameSize, Overview, Still, VideoInfo, Zoom


@dataclass(frozen=True, slots=True)
class Message:
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
    messages: tuple[Message, ...]


class Policy(Protocol):
    """Whoever plays: a vLLM worker, an oracle, a model behind an HTTP API."""

    async def act(self, prompt: Prompt, sampling: Sampling, *, request: str) -> Sampled | Written:
        """Plays one turn. `request` is unique per turn and names it in errors."""
        ...


class FrameSource(Protocol):
    """Whoever has the pixels: the clip pool, or a reader in this process.

    Every method raises `VideoError` if the video cannot be read as asked, and
    `Overdue` if it took longer than the source's own deadline.
    """

    async def probe(self, uri: str) -> VideoInfo: ...

    async def overview(self, uri: str, request: Overview | Chosen | Still, size: FrameSize) -> Clip: ...

    async def zoom(self, uri: str, request: Zoom, size: FrameSize) -> Clip: ...

    async def resolve(self, refs: Sequence[FrameRef]) -> list[Frame]:
        """The same bytes again, in the order asked; checked against each ref's digest."""
        ...


class Ranker(Protocol):
    """Whoever knows which frames of a video are like a text: an image-text model."""

    async def rank(self, uri: str, question: str, search: Search) -> tuple[float, ...]:
        """Seconds of the chosen frames, ascending; the same for the same arguments.

        Raises `VideoError` if the video cannot be read, and `Overdue` past its own deadline.
        """
        ...
