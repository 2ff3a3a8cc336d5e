"""How an episode looked: the patterns that the paper names, read off its zooms. Pure."""

from __future__ import annotations

from enum import StrEnum

from vz_ray.episode.trajectory import Trajectory, ZoomRefused
from vz_ray.video.frame import Zoom


class Pattern(StrEnum):
    """How an episode came to its answer."""

    NO_ZOOM = "no zoom"
    """From the overview alone; calls that were only refused show nothing either."""
    DIRECT = "direct hit"
    """One zoom, at the first call."""
    PROGRESSIVE = "progressive"
    """Several zooms, each on some of what an earlier one showed."""
    CORRECTED = "self-correction"
    """A zoom after a refused call, or one that overlaps none before it."""


def pattern_of(trajectory: Trajectory) -> Pattern:
    """The pattern of a whole trajectory, turns that it began with included."""
    calls = [turn.zoom for turn in trajectory.turns if turn.zoom is not None]
    zooms = [call for call in calls if isinstance(call, Zoom)]
    if not zooms:
        return Pattern.NO_ZOOM
    last = max(i for i, call in enumerate(calls) if isinstance(call, Zoom))
    refused = any(isinstance(call, ZoomRefused) for call in calls[:last])
    moved = any(not any(_overlap(zoom, before) for before in zooms[:i]) for i, zoom in enumerate(zooms) if i)
    if refused or moved:
        return Pattern.CORRECTED
    return Pattern.DIRECT if len(zooms) == 1 else Pattern.PROGRESSIVE


def _overlap(one: Zoom, other: Zoom) -> bool:
    """Whether the segments have more than an instant in common."""
    return one.start_s < other.end_s and other.start_s < one.end_s
