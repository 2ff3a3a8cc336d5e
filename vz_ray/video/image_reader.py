"""Frames that are image files: of data sets that others made, or that were written for them.

They come at the size that the model wants; what `encode_image` wrote as `png` comes back bit for bit.
`ClipReader` serves them beside the frames of videos.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import blake3
import numpy as np
from av.video.reformatter import ColorRange, Interpolation

from vz_ray.video.errors import FrameMismatchError, NotAVideoError, VideoLimitExceededError
from vz_ray.video.frame import RGB, Frame, FrameRef, FrameSize
from vz_ray.video.frame_size import target_size
from vz_ray.video.video_file import VideoLimits, check_pixels, compute_video_id

SCALER = "bicubic+accurate_rnd+bitexact"
_FLAGS = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
IMAGE_DECODER = "image"
"""Start of the decoder's name in references to image files."""
_FORMATS = ("png_pipe", "jpeg_pipe", "webp_pipe", "bmp_pipe")


def is_image(uri: str) -> bool:
    """Whether a file is an image, by the ending of its name."""
    return uri.partition("?")[0].lower().endswith(IMAGE_SUFFIXES)


def read_image(
    uri: str, size: FrameSize, limits: VideoLimits | None = None, *, path: Path | str | None = None
) -> Frame:
    """An image as a frame at time 0, resized as the model's processor would if it has another size.

    Args:
        uri: What its reference calls it.
        size: What the model wants.
        limits: What is refused.
        path: Where it is on this machine; None is at `uri`.

    Raises:
        VideoError: It is missing, no image, or too large.
    """
    return _read(uri, str(path or uri), lambda w, h: target_size(w, h, size), limits or VideoLimits())


def reread_image(
    ref: FrameRef, limits: VideoLimits | None = None, *, path: Path | str | None = None
) -> Frame:
    """The image of a reference, the same bytes again.

    Raises:
        VideoError: As `read_image`; `FrameMismatchError` where the file is not the one referenced.
    """
    found = _read(
        ref.uri, str(path or ref.uri), lambda w, h: (ref.width, ref.height), limits or VideoLimits()
    )
    if found.ref.digest != ref.digest:
        raise FrameMismatchError(
            f"{ref.uri} is not the image referenced: digest {found.ref.digest[:12]}, expected "
            f"{ref.digest[:12]}",
            "a frame shown earlier cannot be shown again",
        )
    return replace(found, ref=ref)


def _read(uri: str, path: str, sized: Callable[[int, int], tuple[int, int]], limits: VideoLimits) -> Frame:
    identity = compute_video_id(uri, path)
    # Opened by content alone: a name may be a pattern for other files. The decoder is told the limit, since
    # FFmpeg decodes an image in order to say how large it is: a megabyte of file may be a gigabyte then.
    options = {
        "format_whitelist": ",".join(_FORMATS),
        "protocol_whitelist": "none",
        "max_pixels": str(limits.max_pixels),
        "err_detect": "explode",
    }
    try:
        # By its descriptor it has no name.
        with open(os.open(path, os.O_RDONLY), "rb") as file, av.open(file, "r", options=options) as container:
            stream = container.streams.video[0]
            if not stream.width * stream.height:
                raise VideoLimitExceededError(
                    f"{uri}: an image that is damaged, or of more than {limits.max_pixels} pixels; scale it down",
                    "an image is damaged, or its resolution is too high",
                )
            check_pixels(uri, stream.width * stream.height, limits)
            stream.codec_context.options = {name: options[name] for name in ("max_pixels", "err_detect")}
            image = next(container.decode(stream))
            rgb = _resized(image, *sized(image.width, image.height))
    except (av.FFmpegError, StopIteration, IndexError, OSError, ValueError) as error:
        raise NotAVideoError(
            f"{uri}: an image that cannot be decoded ({error})", "an image is damaged"
        ) from error
    height, width = rgb.shape[:2]
    digest, decoder = blake3.blake3(rgb.data).hexdigest(), f"{IMAGE_DECODER} {av.__version__}"
    return Frame(FrameRef(identity, uri, 0, 0.0, width, height, SCALER, decoder, digest), rgb)


def _resized(image: av.VideoFrame, width: int, height: int) -> RGB:
    scaled = image.reformat(
        width=width, height=height, format="rgb24", interpolation=_FLAGS, dst_color_range=ColorRange.JPEG
    )
    rgb: RGB = np.ascontiguousarray(scaled.to_ndarray(), dtype=np.uint8)
    rgb.flags.writeable = False
    return rgb
