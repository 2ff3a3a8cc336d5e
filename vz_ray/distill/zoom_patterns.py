"""How an episode looked: the patterns that the paper names, read off its zooms. Pure."""

from __future__ import annotations

from enum import StrEnum

from vz_ray.env.trajectory import RejectedZoom, Trajectory
from vz_ray.video.frame import ZoomRequest


class ZoomPattern(StrEnum):
    """How an episode came to its answer."""

    NO_ZOOM = "no zoom"
    """From the overview alone; calls that were only refused show nothing either."""
    DIRECT = "direct hit"
    """One zoom, at the first call."""
    PROGRESSIVE = "progressive"
    """Several zooms, each on some of what an earlier one showed."""
    CORRECTED = "self-correction"
    """A zoom after a refused call, or one that overlaps none before it."""


def classify_pattern(trajectory: Trajectory) -> ZoomPattern:
    """The pattern of a whole trajectory, turns that it began with included."""
    calls = [turn.zoom for turn in trajectory.turns if turn.zoom is not None]
    zooms = [call for call in calls if isinstance(call, ZoomRequest)]
    if not zooms:
        return ZoomPattern.NO_ZOOM
    last = max(i for i, call in enumerate(calls) if isinstance(call, ZoomRequest))
    refused = any(isinstance(call, RejectedZoom) for call in calls[:last])
    moved = any(not any(_overlap(zoom, before) for before in zooms[:i]) for i, zoom in enumerate(zooms) if i)
    if refused or moved:
        return ZoomPattern.CORRECTED
    return ZoomPattern.DIRECT if len(zooms) == 1 else ZoomPattern.PROGRESSIVE


def _overlap(one: ZoomRequest, other: ZoomRequest) -> bool:
    """Whether the segments have more than an instant in common."""
    return one.start_s < other.end_s and other.start_s < one.end_s
