"""Frames of an overview request."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vz_ray.video.errors import InvalidFrameRequestError
from vz_ray.video.frame import OverviewRequest, SelectedFramesRequest, VideoInfo
from vz_ray.video.frame_table import FrameTable
from vz_ray.video.sampling import overview_times


def overview_pts(request: OverviewRequest | SelectedFramesRequest, info: VideoInfo, table: FrameTable) -> list[int]:
    """Return the ascending pts of the overview frames.

    Raises:
        InvalidFrameRequestError: The request is invalid, or names a frame that the video lacks.
    """
    if isinstance(request, SelectedFramesRequest):
        return _selected_pts(request, info, table)
    pts = [table.pts_at(second) for second in overview_times(request, info)]
    if request.keyframes:
        # Some containers list keyframes before the first displayed frame (gradual refresh).
        keyframes = table.keyframe_pts[np.isin(table.keyframe_pts, table.pts)]
        return snap_to_keyframes(pts, keyframes) if table.seekable and len(keyframes) else _distinct(pts)
    return _distinct(pts) if math.isinf(request.fps) else pts


def snap_to_keyframes(target_pts: Sequence[int], keyframe_pts: NDArray[np.int64]) -> list[int]:
    """Move each target to the nearest unused keyframe.

    Both arguments and the result ascend. The result has `min(len(set(target_pts)),
    len(keyframe_pts))` distinct keyframes.

    Example:
        snap_to_keyframes([0, 40, 90], np.array([0, 50, 60, 100])) == [0, 50, 100]
    """
    targets = _distinct(target_pts)
    if len(targets) >= len(keyframe_pts):
        return [int(pts) for pts in keyframe_pts]
    used = -1
    snapped = []
    for index, pts in enumerate(targets):
        after = int(np.searchsorted(keyframe_pts, pts, side="left"))
        nearest = after
        if after == len(keyframe_pts) or (after > 0 and pts - keyframe_pts[after - 1] <= keyframe_pts[after] - pts):
            nearest = after - 1
        last = len(keyframe_pts) - (len(targets) - index)  # leaves one keyframe per later target
        used = min(max(nearest, used + 1), last)
        snapped.append(int(keyframe_pts[used]))
    return snapped


def spread_indices(count: int, max_count: int) -> list[int]:
    """Return up to `max_count` evenly spread indices of `count` items, from the first on."""
    return list(range(count)) if count <= max_count else [k * count // max_count for k in range(max_count)]


def _selected_pts(request: SelectedFramesRequest, info: VideoInfo, table: FrameTable) -> list[int]:
    num_frames = len(table.pts)
    missing = [index for index in request.frame_indices if not 0 <= index < num_frames]
    if missing:
        raise InvalidFrameRequestError(
            f"{info.uri}: selected frame {missing[0]} does not exist, the video has {num_frames} frames; "
            "select frames from this version of the file",
            "a frame that was asked for is not in the video",
        )
    outside = [second for second in request.times_s if not 0 <= second <= info.duration_s]
    if outside or not request.max_frames:
        selection = f"the selected time {outside[0]} s is outside the video" if outside else "no frame selected"
        raise InvalidFrameRequestError(
            f"{info.uri}: {selection}; select times from 0 to {info.duration_s:.2f} s",
            "the overview cannot be shown",
        )
    by_index = [int(table.pts[index]) for index in request.frame_indices]
    return _distinct([*by_index, *(table.pts_at(second) for second in request.times_s)])


def _distinct(pts: Sequence[int]) -> list[int]:
    return sorted(set(pts))
