"""What an episode tells whoever watches it while it is played: a server that streams, a terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from vz_ray.env.trajectory import Turn
from vz_ray.video.frame import Clip, Frame, VideoInfo, ZoomRequest


@dataclass(frozen=True, slots=True)
class EpisodeStarted:
    """The overviews have been decoded.

    Attributes:
        videos: In the order in which they are counted; none where a chat is about none.
        overviews: One for each video.
        question_images: Of the question.
    """

    videos: tuple[VideoInfo, ...]
    overviews: tuple[Clip, ...]
    question_images: tuple[Frame, ...]


@dataclass(frozen=True, slots=True)
class ZoomRequested:
    """The policy has asked for a clip, which is being decoded now.

    Attributes:
        turn_index: Of the turn, from 0.
    """

    turn_index: int
    zoom: ZoomRequest


@dataclass(frozen=True, slots=True)
class TurnCompleted:
    """A turn is complete, with what it got back.

    Attributes:
        turn_index: Of the turn, from 0.
        clip: What was shown, where the turn's zoom was carried out.
    """

    turn_index: int
    turn: Turn
    clip: Clip | None = None


EpisodeEvent: TypeAlias = EpisodeStarted | ZoomRequested | TurnCompleted
EventCallback: TypeAlias = Callable[[EpisodeEvent], None]
"""Called in the episode's event loop; must not block."""


def ignore_event(event: EpisodeEvent) -> None:
    """Watches nothing."""
