"""Frames as small embedded images, rebuilt from their references."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from vz_ray.episode.protocols import FrameSource
from vz_ray.observe.deadline import Overdue, within
from vz_ray.video.frame import RGB, FrameRef, VideoError
from vz_ray.video.image import encode_image

_LOSSLESS_AREA = 64 * 64
"""Frames up to this area are embedded exactly; a lossy 28 x 28 frame would mislead."""


def data_uri(rgb: RGB, longest: int) -> str:
    """`rgb` as a `data:` URI, at most `longest` pixels a side: PNG if tiny, else JPEG."""
    height, width = rgb.shape[:2]
    scale = min(1.0, longest / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    kind = "png" if size[0] * size[1] <= _LOSSLESS_AREA else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(encode_image(rgb, kind, size)).decode()}"


async def thumbnails(
    refs: Sequence[FrameRef], frames: FrameSource, *, longest: int, deadline_s: float
) -> tuple[dict[FrameRef, str], str]:
    """A `data:` URI for each of `refs`, and why there are none where that is so."""
    wanted = list(dict.fromkeys(refs))
    try:
        found = await within(
            deadline_s, frames.resolve(wanted), who="the frame source", what=f"{len(wanted)} thumbnails"
        )
    except (VideoError, Overdue) as error:
        return {}, str(error)
    return {ref: data_uri(frame.rgb, longest) for ref, frame in zip(wanted, found, strict=True)}, ""
