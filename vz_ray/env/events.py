"""Events of a running episode, for streaming."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from vz_ray.env.trajectory import Turn
from vz_ray.video.frame import Clip, Frame, VideoInfo, ZoomRequest


@dataclass(frozen=True, slots=True)
class EpisodeStarted:
    """The overviews, one per video of the task, and the question's images have been decoded."""

    videos: tuple[VideoInfo, ...]
    overviews: tuple[Clip, ...]
    question_images: tuple[Frame, ...]


@dataclass(frozen=True, slots=True)
class ZoomRequested:
    """The policy has requested a clip, which is now being decoded. `turn_index` counts from 0."""

    turn_index: int
    zoom: ZoomRequest


@dataclass(frozen=True, slots=True)
class TurnCompleted:
    """A turn and its observation are complete. `clip` is None unless a zoom was executed."""

    turn_index: int
    turn: Turn
    clip: Clip | None = None


EpisodeEvent: TypeAlias = EpisodeStarted | ZoomRequested | TurnCompleted
EventCallback: TypeAlias = Callable[[EpisodeEvent], None]
"""Called in the episode's event loop. It must not block."""


def ignore_event(event: EpisodeEvent) -> None:
    """Default callback: do nothing."""
