"""Encoding of frames as image files."""

from __future__ import annotations

import base64
from fractions import Fraction

import av
import numpy as np

from vz_ray.video.frame import RGB

_LOSSLESS_AREA = 64 * 64
"""Frames up to this area are encoded losslessly: JPEG artifacts would distort a 28 x 28 frame."""
_CODECS = {"png": ("png", "rgb24"), "jpeg": ("mjpeg", "yuvj420p")}


def encode_image(rgb: RGB, format: str = "png", size: tuple[int, int] | None = None) -> bytes:
    """Encode `rgb` as a `png` or `jpeg` file, resized to `size` (width, height) if given."""
    codec, pixel_format = _CODECS[format]
    height, width = rgb.shape[:2]
    width, height = size or (width, height)
    image = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
    image = image.reformat(width=width, height=height, format=pixel_format)
    image.pts = 0
    encoder = av.CodecContext.create(codec, "w")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.width, encoder.height, encoder.pix_fmt = width, height, pixel_format
    encoder.time_base = Fraction(1, 25)
    encoder.thread_count = 1
    return b"".join(bytes(packet) for packet in [*encoder.encode(image), *encoder.encode(None)])


def encode_data_uri(rgb: RGB, max_side: int) -> str:
    """Encode `rgb` as a `data:` URI with sides up to `max_side` pixels: PNG if tiny, else JPEG."""
    height, width = rgb.shape[:2]
    scale = min(1.0, max_side / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    format = "png" if size[0] * size[1] <= _LOSSLESS_AREA else "jpeg"
    return f"data:image/{format};base64,{base64.b64encode(encode_image(rgb, format, size)).decode()}"
