"""What an episode tells whoever watches it while it is played: a server that streams, a terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from vz_ray.episode.trajectory import Turn
from vz_ray.video.frame import Clip, Frame, VideoInfo, Zoom


@dataclass(frozen=True, slots=True)
class Begun:
    """The overviews have been decoded.

    Attributes:
        videos: In the order in which they are counted; none where a chat is about none.
        overviews: One for each video.
        pictures: Of the question.
    """

    videos: tuple[VideoInfo, ...]
    overviews: tuple[Clip, ...]
    pictures: tuple[Frame, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """The policy has asked for a clip, which is being decoded now.

    Attributes:
        number: Of the turn, from 0.
    """

    number: int
    zoom: Zoom


@dataclass(frozen=True, slots=True)
class Ended:
    """A turn is complete, with what it got back.

    Attributes:
        number: Of the turn, from 0.
        clip: What was shown, where the turn's zoom was carried out.
    """

    number: int
    turn: Turn
    clip: Clip | None = None


Event: TypeAlias = Begun | Asked | Ended
Watcher: TypeAlias = Callable[[Event], None]
"""Called in the episode's event loop; must not block."""


def nobody(event: Event) -> None:
    """Watches nothing."""
