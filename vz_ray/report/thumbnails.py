"""Frames as small embedded images, rebuilt from their references."""

from __future__ import annotations

from collections.abc import Sequence

from vz_ray.env.protocols import FrameSource
from vz_ray.utils.timeouts import StepTimeout, with_timeout
from vz_ray.video.errors import VideoError
from vz_ray.video.frame import FrameRef
from vz_ray.video.image_encoding import encode_data_uri


async def make_thumbnails(
    refs: Sequence[FrameRef], frames: FrameSource, *, max_side_px: int, timeout_s: float
) -> tuple[dict[FrameRef, str], str]:
    """A `data:` URI for each of `refs`, and why there are none where that is so."""
    wanted = list(dict.fromkeys(refs))
    try:
        found = await with_timeout(
            frames.resolve(wanted),
            timeout_s,
            target="the frame source",
            operation=f"{len(wanted)} thumbnails",
        )
    except (VideoError, StepTimeout) as error:
        return {}, str(error)
    return {
        ref: encode_data_uri(frame.rgb, max_side_px) for ref, frame in zip(wanted, found, strict=True)
    }, ""
