"""Frames as small embedded images, rebuilt from their references."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

from vz_ray.episode.protocols import FrameSource
from vz_ray.observe.deadline import Overdue, within
from vz_ray.video.frame import RGB, FrameRef, VideoError

_LOSSLESS_AREA = 64 * 64
"""Frames up to this area are embedded exactly; a lossy 28 x 28 frame would mislead."""


def _shrunk(frame: av.VideoFrame, longest: int) -> tuple[int, int]:
    scale = min(1.0, longest / max(frame.width, frame.height))
    return max(1, round(frame.width * scale)), max(1, round(frame.height * scale))


def data_uri(rgb: RGB, longest: int) -> str:
    """`rgb` as a `data:` URI, at most `longest` pixels a side: PNG if tiny, else JPEG."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
    width, height = _shrunk(frame, longest)
    exact = width * height <= _LOSSLESS_AREA
    codec, pixels, kind = ("png", "rgb24", "png") if exact else ("mjpeg", "yuvj420p", "jpeg")
    small = frame.reformat(width=width, height=height, format=pixels)
    small.pts = 0
    encoder = av.CodecContext.create(codec, "w")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.width, encoder.height, encoder.pix_fmt = width, height, pixels
    encoder.time_base = Fraction(1, 25)
    encoder.thread_count = 1
    packets = [*encoder.encode(small), *encoder.encode(None)]
    body = base64.b64encode(b"".join(bytes(packet) for packet in packets)).decode()
    return f"data:image/{kind};base64,{body}"


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
