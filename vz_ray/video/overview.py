"""Which frames of a video an overview request means."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vz_ray.video.errors import InvalidFrameRequestError
from vz_ray.video.frame import OverviewRequest, SelectedFramesRequest, VideoInfo
from vz_ray.video.frame_table import FrameTable
from vz_ray.video.sampling import overview_times


def overview_pts(
    request: OverviewRequest | SelectedFramesRequest, info: VideoInfo, table: FrameTable
) -> list[int]:
    """pts of each frame, ascending, as `table` has them.

    Raises:
        BadRequest: The request makes no sense, or names a frame that the video does not have.
    """
    if isinstance(request, SelectedFramesRequest):
        return _chosen_pts(request, info, table)
    wanted = [table.pts_at(second) for second in overview_times(request, info)]
    if request.keyframes:
        # Keyframes that cannot be sought, or of a gradual refresh that precedes the first frame, are no use.
        keys = table.keyframe_pts[np.isin(table.keyframe_pts, table.pts)]
        return snap_to_keyframes(wanted, keys) if table.seekable and len(keys) else _once(wanted)
    return _once(wanted) if math.isinf(request.fps) else wanted


def snap_to_keyframes(wanted: Sequence[int], keys: NDArray[np.int64]) -> list[int]:
    """Each of `wanted` moved to the nearest of `keys`; where that is taken, to one beside it.

    Both ascend, and so does what is returned: `min(len(set(wanted)), len(keys))` distinct keys.

    Example:
        snapped([0, 40, 90], np.array([0, 50, 60, 100])) == [0, 50, 100]
    """
    once = _once(wanted)
    if len(once) >= len(keys):
        return [int(key) for key in keys]
    taken = -1
    found = []
    for place, pts in enumerate(once):
        after = int(np.searchsorted(keys, pts, side="left"))
        nearest = after
        if after == len(keys) or (after > 0 and pts - keys[after - 1] <= keys[after] - pts):
            nearest = after - 1
        last = len(keys) - (len(once) - place)  # leaves one for each that follows
        taken = min(max(nearest, taken + 1), last)
        found.append(int(keys[taken]))
    return found


def spread_indices(count: int, max_count: int) -> list[int]:
    """Indices of at most `max_count` of `count` things, spread evenly from the first on."""
    return list(range(count)) if count <= max_count else [k * count // max_count for k in range(max_count)]


def _chosen_pts(request: SelectedFramesRequest, info: VideoInfo, table: FrameTable) -> list[int]:
    beyond = [number for number in request.frame_indices if not 0 <= number < len(table.pts)]
    if beyond:
        raise InvalidFrameRequestError(
            f"{info.uri}: frame {beyond[0]} was chosen for the overview, and it has {len(table.pts)} frames; "
            "the choice was made on another version of the file",
            "a frame that was asked for is not in the video",
        )
    late = [second for second in request.times_s if not 0 <= second <= info.duration_s]
    if late or not request.max_frames:
        what = f"the frame at {late[0]} s" if late else "no frame"
        raise InvalidFrameRequestError(
            f"{info.uri}: {what} was chosen for the overview, of {info.duration_s:.2f} s",
            "the overview cannot be shown",
        )
    by_number = [int(table.pts[number]) for number in request.frame_indices]
    return _once([*by_number, *(table.pts_at(second) for second in request.times_s)])


def _once(wanted: Sequence[int]) -> list[int]:
    return sorted(set(wanted))
