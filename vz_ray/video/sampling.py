"""Which times a request means, by the rules of the protocol. Pure arithmetic, no video is touched.

Where a rule speaks of native frame indices (those of the released VideoZoomer
code do), index i becomes the time in the middle of frame i at the average
rate: exactly that frame where the rate is constant.
"""

from __future__ import annotations

import math

from vz_ray.video.errors import InvalidFrameRequestError
from vz_ray.video.frame import OverviewRequest, VideoInfo, ZoomRequest

_ROUNDING = 1e-6
_PAST_END_S = 0.05
"""How far past the end a zoom may reach: the model reads durations rounded to two decimals."""

_SPREADS = ("starts", "endpoints")


def overview_times(request: OverviewRequest, info: VideoInfo) -> list[float]:
    """Seconds of each overview frame, ascending; keyframes are another matter (`overview_pts`).

    `starts`: at k / fps while that is inside the video; where there would be
    more than `max_frames`, that many, the k-th of n at k / n of the duration.
    `endpoints`: every `max(1, round(native / fps))`-th frame, or `max_frames`
    from the first frame to the last (released VideoZoomer code).

    Raises:
        BadRequest: A rate or number of frames that is not positive, an unknown spread.
    """
    if request.fps != math.inf:
        _positive(request.fps, "fps")
    if request.max_frames < 1:
        raise InvalidFrameRequestError(
            f"max_frames must be at least 1, got {request.max_frames}", "no frames asked for"
        )
    if request.spread not in _SPREADS:
        raise InvalidFrameRequestError(
            f"spread must be one of {_SPREADS}, got {request.spread!r}", "unknown spread"
        )
    if request.spread == "endpoints":
        return _overview_by_index(request, info)
    frames = info.duration_s * request.fps - _ROUNDING
    if frames <= request.max_frames:
        return [k / request.fps for k in range(max(1, math.ceil(frames)))]
    return [k * info.duration_s / request.max_frames for k in range(request.max_frames)]


def zoom_times(request: ZoomRequest, info: VideoInfo) -> list[float]:
    """Seconds of each frame of a zoom, ascending: start + j / fps, or by index where `inclusive`.

    Raises:
        BadRequest: Reversed, empty, not finite, negative or outside the video.
    """
    start, end, fps = request.start_s, request.end_s, request.fps
    if not (math.isfinite(start) and math.isfinite(end)):
        raise InvalidFrameRequestError(
            f"segment [{start}, {end}] is not finite", "the segment must be two finite numbers"
        )
    _positive(fps, "fps")
    if end < start:
        raise InvalidFrameRequestError(
            f"segment [{start}, {end}] ends before it starts", "the segment is reversed"
        )
    if start < 0:
        raise InvalidFrameRequestError(
            f"segment [{start}, {end}] starts before 0", "the segment starts before 0"
        )
    if request.num_frames < 1:
        raise InvalidFrameRequestError(
            f"segment [{start}, {end}] at {fps} fps holds no frame",
            "the segment holds no frame at this fps; make it longer or raise fps",
        )
    if request.inclusive:
        return _zoom_by_index(request, info)
    if start >= info.duration_s or end > info.duration_s + max(_PAST_END_S, 1 / info.fps):
        raise InvalidFrameRequestError(
            f"{info.uri}: segment [{start}, {end}] lies outside the video, {info.duration_s:.2f} s long",
            f"the segment must lie within 0 and {info.duration_s:.2f}",
        )
    return [start + j / fps for j in range(request.num_frames)]


def _overview_by_index(request: OverviewRequest, info: VideoInfo) -> list[float]:
    total = _native_frames(info)
    indices = list(range(0, total, max(1, round(info.fps / request.fps))))
    if len(indices) > request.max_frames:
        indices = _spread(0, total - 1, request.max_frames)
    return [(i + 0.5) / info.fps for i in indices]


def _zoom_by_index(request: ZoomRequest, info: VideoInfo) -> list[float]:
    last = _native_frames(info) - 1
    first_index = min(int(request.start_s * info.fps), last)
    last_index = min(int(request.end_s * info.fps), last)
    return [(i + 0.5) / info.fps for i in _spread(first_index, last_index, request.num_frames)]


def _spread(first: int, last: int, count: int) -> list[int]:
    """`count` integers from `first` to `last` inclusive, evenly spread, rounded down."""
    if count == 1:
        return [first]
    return [int(first + k * (last - first) / (count - 1)) for k in range(count)]


def _native_frames(info: VideoInfo) -> int:
    return max(1, round(info.duration_s * info.fps))


def _positive(value: float, name: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise InvalidFrameRequestError(
            f"{name} must be a positive number, got {value}", f"{name} must be a positive number"
        )
