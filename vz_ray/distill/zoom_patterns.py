"""Classification of episodes by the zoom patterns that the paper names."""

from __future__ import annotations

from enum import StrEnum

from vz_ray.env.trajectory import RejectedZoom, Trajectory
from vz_ray.video.frame import ZoomRequest


class ZoomPattern(StrEnum):
    """Sequence of zooms before the answer."""

    NO_ZOOM = "no zoom"
    """No executed zoom; rejected calls do not count."""
    DIRECT = "direct hit"
    """One zoom, without a rejected call before it."""
    PROGRESSIVE = "progressive"
    """Several zooms; each overlaps an earlier one."""
    CORRECTED = "self-correction"
    """A zoom after a rejected call, or a zoom that overlaps no earlier one."""


def classify_pattern(trajectory: Trajectory) -> ZoomPattern:
    """Classify a trajectory, including its prefix turns."""
    calls = [turn.zoom for turn in trajectory.turns if turn.zoom is not None]
    zooms = [call for call in calls if isinstance(call, ZoomRequest)]
    if not zooms:
        return ZoomPattern.NO_ZOOM
    last = max(i for i, call in enumerate(calls) if isinstance(call, ZoomRequest))
    has_rejected = any(isinstance(call, RejectedZoom) for call in calls[:last])
    has_jump = any(not any(_overlap(zoom, earlier) for earlier in zooms[:i]) for i, zoom in enumerate(zooms) if i)
    if has_rejected or has_jump:
        return ZoomPattern.CORRECTED
    return ZoomPattern.DIRECT if len(zooms) == 1 else ZoomPattern.PROGRESSIVE


def _overlap(first: ZoomRequest, second: ZoomRequest) -> bool:
    """Return whether two segments share more than one instant."""
    return first.start_s < second.end_s and second.start_s < first.end_s
