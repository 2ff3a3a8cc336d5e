"""Frames of overview and zoom requests: their times, and their pts in a video. Pure arithmetic.

Rules in terms of native frame indices (released VideoZoomer code) map index i to the middle of
frame i at the average rate. At a constant rate this is exactly frame i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vz_ray.video.errors import InvalidFrameRequestError
from vz_ray.video.frame import OverviewRequest, SelectedFramesRequest, VideoInfo, ZoomRequest
from vz_ray.video.frame_table import FrameTable

_ROUNDING_TOLERANCE = 1e-6
_END_TOLERANCE_S = 0.05
"""Allowed excess of a zoom over the duration: the model reads durations rounded to two decimals."""

_SPREADS = ("starts", "endpoints")


def clip_pts(
    request: OverviewRequest | SelectedFramesRequest | ZoomRequest, info: VideoInfo, table: FrameTable
) -> list[int]:
    """Return the ascending pts of the requested frames.

    Raises:
        InvalidFrameRequestError: The request is invalid, or names a frame that the video lacks.
    """
    if isinstance(request, ZoomRequest):
        return [table.pts_at(second) for second in zoom_times(request, info)]
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


def overview_times(request: OverviewRequest, info: VideoInfo) -> list[float]:
    """Return the ascending times of the overview frames, seconds. See `clip_pts` for keyframes.

    `starts`: k / fps within the video. Beyond `max_frames` frames: k / n of the duration, for n =
    `max_frames`. `endpoints`: every `max(1, round(native / fps))`-th frame. Beyond `max_frames`
    frames: evenly from the first to the last frame (released VideoZoomer code).

    Raises:
        InvalidFrameRequestError: A rate or number of frames that is not positive, or an unknown spread.
    """
    if request.fps != math.inf:
        _check_positive(request.fps, "fps")
    if request.max_frames < 1:
        raise InvalidFrameRequestError(
            f"max_frames must be at least 1, got {request.max_frames}", "no frames asked for"
        )
    if request.spread not in _SPREADS:
        raise InvalidFrameRequestError(f"spread must be one of {_SPREADS}, got {request.spread!r}", "unknown spread")
    if request.spread == "endpoints":
        return _overview_by_index(request, info)
    num_frames = info.duration_s * request.fps - _ROUNDING_TOLERANCE
    if num_frames <= request.max_frames:
        return [k / request.fps for k in range(max(1, math.ceil(num_frames)))]
    return [k * info.duration_s / request.max_frames for k in range(request.max_frames)]


def zoom_times(request: ZoomRequest, info: VideoInfo) -> list[float]:
    """Return the ascending times of the zoom frames, seconds: start + j / fps, or by index if `inclusive`.

    Raises:
        InvalidFrameRequestError: The segment is reversed, empty, not finite, negative or outside the video.
    """
    start, end, fps = request.start_s, request.end_s, request.fps
    if not (math.isfinite(start) and math.isfinite(end)):
        raise InvalidFrameRequestError(
            f"segment [{start}, {end}] is not finite", "the segment must be two finite numbers"
        )
    _check_positive(fps, "fps")
    if end < start:
        raise InvalidFrameRequestError(f"segment [{start}, {end}] ends before it starts", "the segment is reversed")
    if start < 0:
        raise InvalidFrameRequestError(f"segment [{start}, {end}] starts before 0", "the segment starts before 0")
    if request.num_frames < 1:
        raise InvalidFrameRequestError(
            f"segment [{start}, {end}] at {fps} fps contains no frame; make it longer or raise fps",
            "the segment holds no frame at this fps; make it longer or raise fps",
        )
    if request.inclusive:
        return _zoom_by_index(request, info)
    if start >= info.duration_s or end > info.duration_s + max(_END_TOLERANCE_S, 1 / info.fps):
        raise InvalidFrameRequestError(
            f"{info.uri}: segment [{start}, {end}] is outside the video ({info.duration_s:.2f} s)",
            f"the segment must lie within 0 and {info.duration_s:.2f}",
        )
    return [start + j / fps for j in range(request.num_frames)]


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


def _overview_by_index(request: OverviewRequest, info: VideoInfo) -> list[float]:
    total = _num_native_frames(info)
    indices = list(range(0, total, max(1, round(info.fps / request.fps))))
    if len(indices) > request.max_frames:
        indices = _spread_evenly(0, total - 1, request.max_frames)
    return [(i + 0.5) / info.fps for i in indices]


def _zoom_by_index(request: ZoomRequest, info: VideoInfo) -> list[float]:
    last = _num_native_frames(info) - 1
    first_index = min(int(request.start_s * info.fps), last)
    last_index = min(int(request.end_s * info.fps), last)
    return [(i + 0.5) / info.fps for i in _spread_evenly(first_index, last_index, request.num_frames)]


def _spread_evenly(first: int, last: int, count: int) -> list[int]:
    """Return `count` evenly spread integers from `first` to `last` inclusive, rounded down."""
    if count == 1:
        return [first]
    return [int(first + k * (last - first) / (count - 1)) for k in range(count)]


def _num_native_frames(info: VideoInfo) -> int:
    return max(1, round(info.duration_s * info.fps))


def _check_positive(value: float, name: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise InvalidFrameRequestError(
            f"{name} must be a positive number, got {value}", f"{name} must be a positive number"
        )
