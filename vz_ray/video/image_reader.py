"""Image files as frames, resized for the model. PNG files of `encode_image` are read back losslessly."""

from __future__ import annotations

import os
from pathlib import Path

import av
import blake3
from av.video.reformatter import VideoReformatter

from vz_ray.video.errors import NotAVideoError, VideoLimitExceededError
from vz_ray.video.frame import Frame, FrameRef, FrameSize
from vz_ray.video.frame_scaling import SCALER, scale_frame, target_size
from vz_ray.video.video_file import VideoLimits, check_pixels, compute_video_id

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
IMAGE_DECODER = "image"
"""Prefix of `FrameRef.decoder` for image files."""
_FORMATS = ("png_pipe", "jpeg_pipe", "webp_pipe", "bmp_pipe")


def is_image(uri: str) -> bool:
    """Return whether the file has an image suffix."""
    return uri.partition("?")[0].lower().endswith(IMAGE_SUFFIXES)


def read_image(
    uri: str,
    size: FrameSize | tuple[int, int],
    limits: VideoLimits | None = None,
    *,
    path: Path | str | None = None,
) -> Frame:
    """Read an image as a frame at time 0, resized like a video frame.

    Args:
        uri: URI in the reference.
        size: Bounds on the area, or the exact width and height.
        path: Local path; defaults to `uri`.

    Raises:
        VideoError: The file is missing, too large, or not an image.
    """
    path, limits = str(path or uri), limits or VideoLimits()
    content_hash = compute_video_id(uri, path)
    # The whitelists stop FFmpeg from treating the name as a pattern of other files. FFmpeg decodes an
    # image to get its size, so the decoder needs the limit: a 1 MB file may decode to 1 GB.
    options = {
        "format_whitelist": ",".join(_FORMATS),
        "protocol_whitelist": "none",
        "max_pixels": str(limits.max_pixels),
        "err_detect": "explode",
    }
    try:
        # A file descriptor has no name.
        with open(os.open(path, os.O_RDONLY), "rb") as file, av.open(file, "r", options=options) as container:
            stream = container.streams.video[0]
            if not stream.width * stream.height:
                raise VideoLimitExceededError(
                    f"{uri}: a corrupt image, or more than {limits.max_pixels} pixels; scale it down",
                    "an image is damaged, or its resolution is too high",
                )
            check_pixels(uri, stream.width * stream.height, limits)
            stream.codec_context.options = {name: options[name] for name in ("max_pixels", "err_detect")}
            image = next(container.decode(stream))
            exact_size = target_size(image.width, image.height, size) if isinstance(size, FrameSize) else size
            rgb = scale_frame(VideoReformatter(), image, *exact_size)
    except (av.FFmpegError, StopIteration, IndexError, OSError, ValueError) as error:
        raise NotAVideoError(f"{uri}: cannot decode the image ({error})", "an image is damaged") from error
    height, width = rgb.shape[:2]
    digest, decoder = blake3.blake3(rgb.data).hexdigest(), f"{IMAGE_DECODER} {av.__version__}"
    return Frame(FrameRef(content_hash, uri, 0, 0.0, width, height, SCALER, decoder, digest), rgb)
