"""Frames that are image files: of data sets that others made, or that were written for them.

They come at the size that the model wants; what `encode_image` wrote as `png` comes back bit for bit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import av
import blake3
import numpy as np
from av.video.reformatter import ColorRange, Interpolation

from vz_ray.observe.deadline import within
from vz_ray.video.errors import FrameMismatch, NotAVideo
from vz_ray.video.frame import RGB, Clip, Frame, FrameRef, FrameSize, Overview, VideoInfo, Zoom
from vz_ray.video.size import target_size
from vz_ray.video.source import Limits, check_pixels, video_id

SCALER = "bicubic+accurate_rnd+bitexact"
_FLAGS = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
_FORMATS = ("png_pipe", "jpeg_pipe", "webp_pipe", "bmp_pipe", "image2", "mjpeg")


def read_image(path: str, size: FrameSize, limits: Limits | None = None) -> Frame:
    """An image as a frame at time 0, resized as the model's processor would if it has another size.

    Raises:
        VideoError: It is missing, no image, or too large.
    """
    return _read(path, lambda width, height: target_size(width, height, size), limits or Limits())


def _read(path: str, sized: Callable[[int, int], tuple[int, int]], limits: Limits) -> Frame:
    identity = video_id(path)
    try:
        with av.open(path, "r") as container:
            if container.format.name not in _FORMATS:
                raise NotAVideo(f"{path}: not an image but {container.format.name}", "an image is damaged")
            stream = container.streams.video[0]
            check_pixels(path, stream.width * stream.height, limits)
            image = next(container.decode(stream))
            rgb = _resized(image, *sized(image.width, image.height))
    except (av.FFmpegError, StopIteration, IndexError, OSError) as error:
        raise NotAVideo(
            f"{path}: an image that cannot be decoded ({error})", "an image is damaged"
        ) from error
    height, width = rgb.shape[:2]
    digest, decoder = blake3.blake3(rgb.data).hexdigest(), f"image {av.__version__}"
    return Frame(FrameRef(identity, path, 0, 0.0, width, height, SCALER, decoder, digest), rgb)


def _resized(image: av.VideoFrame, width: int, height: int) -> RGB:
    scaled = image.reformat(
        width=width, height=height, format="rgb24", interpolation=_FLAGS, dst_color_range=ColorRange.JPEG
    )
    rgb: RGB = np.ascontiguousarray(scaled.to_ndarray(), dtype=np.uint8)
    rgb.flags.writeable = False
    return rgb


class ImageFiles:
    """A `FrameSource` of image files alone; it can be sent to actors.

    Args:
        deadline_s: How long one request may take.
    """

    def __init__(self, deadline_s: float = 120.0) -> None:
        self._deadline_s = deadline_s

    async def probe(self, uri: str) -> VideoInfo:
        raise NotAVideo(f"{uri}: an image has no duration", "the file is an image, not a video")

    async def overview(self, uri: str, request: Overview, size: FrameSize) -> Clip:
        reading = asyncio.to_thread(read_image, uri, size)
        frame = await within(self._deadline_s, reading, who="the disk", what=f"image {uri}")
        return Clip(request, (frame,))

    async def zoom(self, uri: str, request: Zoom, size: FrameSize) -> Clip:
        raise NotAVideo(f"{uri}: an image cannot be zoomed in time", "the file is an image, not a video")

    async def resolve(self, refs: Sequence[FrameRef]) -> list[Frame]:
        reading = asyncio.to_thread(lambda: [_again(ref) for ref in refs])
        return await within(self._deadline_s, reading, who="the disk", what=f"{len(refs)} images")


def _again(ref: FrameRef) -> Frame:
    frame = _read(ref.uri, lambda width, height: (ref.width, ref.height), Limits())
    if frame.ref.digest != ref.digest:
        raise FrameMismatch(
            f"{ref.uri} is not the image referenced: digest {frame.ref.digest[:12]}, expected "
            f"{ref.digest[:12]}",
            "a frame shown earlier cannot be shown again",
        )
    return replace(frame, ref=ref)
