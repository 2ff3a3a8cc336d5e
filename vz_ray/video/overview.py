"""Which frames of a video an overview request means."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vz_ray.video.errors import BadRequest
from vz_ray.video.frame import Chosen, Overview, VideoInfo
from vz_ray.video.sampling import overview_times
from vz_ray.video.table import FrameTable


def overview_pts(request: Overview | Chosen, info: VideoInfo, table: FrameTable) -> list[int]:
    """pts of each frame, ascending, as `table` has them.

    Raises:
        BadRequest: The request makes no sense, or names a frame that the video does not have.
    """
    if isinstance(request, Chosen):
        return _chosen_pts(request, info, table)
    wanted = [table.at(second) for second in overview_times(request, info)]
    if request.keyframes:
        # Keyframes that cannot be sought, or of a gradual refresh that precedes the first frame, are no use.
        keys = table.key_pts[np.isin(table.key_pts, table.pts)]
        return snapped(wanted, keys) if table.seekable and len(keys) else _once(wanted)
    return _once(wanted) if math.isinf(request.fps) else wanted


def snapped(wanted: Sequence[int], keys: NDArray[np.int64]) -> list[int]:
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


def thinned(count: int, most: int) -> list[int]:
    """Indices of at most `most` of `count` things, spread evenly from the first on."""
    return list(range(count)) if count <= most else [k * count // most for k in range(most)]


def _chosen_pts(request: Chosen, info: VideoInfo, table: FrameTable) -> list[int]:
    beyond = [number for number in request.numbers if not 0 <= number < len(table.pts)]
    if beyond:
        raise BadRequest(
            f"{info.uri}: frame {beyond[0]} was chosen for the overview, and it has {len(table.pts)} frames; "
            "the choice was made on another version of the file",
            "a frame that was asked for is not in the video",
        )
    late = [second for second in request.times_s if not 0 <= second <= info.duration_s]
    if late or not request.max_frames:
        what = f"the frame at {late[0]} s" if late else "no frame"
        raise BadRequest(
            f"{info.uri}: {what} was chosen for the overview, of {info.duration_s:.2f} s",
            "the overview cannot be shown",
        )
    by_number = [int(table.pts[number]) for number in request.numbers]
    return _once([*by_number, *(table.at(second) for second in request.times_s)])


def _once(wanted: Sequence[int]) -> list[int]:
    return sorted(set(wanted))
