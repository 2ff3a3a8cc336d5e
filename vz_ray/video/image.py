"""Frames as image files."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np

from vz_ray.video.frame import RGB

_KINDS = {"png": ("png", "rgb24"), "jpeg": ("mjpeg", "yuvj420p")}


def encode_image(rgb: RGB, kind: str = "png", size: tuple[int, int] | None = None) -> bytes:
    """`rgb` as the bytes of a `png` or `jpeg` file, scaled to `size` (width, height) if one is given."""
    codec, pixels = _KINDS[kind]
    height, width = rgb.shape[:2]
    width, height = size or (width, height)
    image = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
    image = image.reformat(width=width, height=height, format=pixels)
    image.pts = 0
    encoder = av.CodecContext.create(codec, "w")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.width, encoder.height, encoder.pix_fmt = width, height, pixels
    encoder.time_base = Fraction(1, 25)
    encoder.thread_count = 1
    return b"".join(bytes(packet) for packet in [*encoder.encode(image), *encoder.encode(None)])
