"""Target size of a frame, by the resize rule of the Qwen-VL image processor, and scaling to it."""

from __future__ import annotations

import math

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from vz_ray.video.errors import VideoLimitExceededError
from vz_ray.video.frame import RGB, FrameSize

SCALER = "bicubic+accurate_rnd+bitexact"
_FLAGS = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
_MAX_ASPECT_RATIO = 200
_MAX_ITERATIONS = 16


def target_size(width: int, height: int, size: FrameSize) -> tuple[int, int]:
    """Return the `(width, height)` to which the Qwen-VL image processor resizes a frame.

    Both sides are multiples of `size.factor`, the area is within the bounds, and the processor
    does not resize the result again (source: resize rule of the Qwen2-VL image processor). For
    elongated frames the rule is not idempotent, so it is repeated until the size is stable.

    Raises:
        VideoLimitExceededError: The aspect ratio exceeds 200, which the processor rejects.

    Example:
        >>> target_size(640, 360, FrameSize(25_088, 100_352, 28))
        (420, 224)
    """
    current = width, height
    for _ in range(_MAX_ITERATIONS):
        # Rounding to multiples of the factor can increase the aspect ratio.
        if max(current) > _MAX_ASPECT_RATIO * min(current):
            raise VideoLimitExceededError(
                f"the aspect ratio of a {width}x{height} frame exceeds {_MAX_ASPECT_RATIO} "
                f"(after resizing to {current[0]}x{current[1]}); crop the video",
                "the video's frames are too elongated to be shown",
            )
        resized = _resize(*current, size)
        if resized == current:
            return current
        current = resized
    raise ValueError(f"no size for {width}x{height} frames is within {size}; widen the bounds")


def _resize(width: int, height: int, size: FrameSize) -> tuple[int, int]:
    factor = size.factor
    new_width, new_height = round(width / factor) * factor, round(height / factor) * factor
    if new_width * new_height > size.max_pixels:
        shrink = math.sqrt(width * height / size.max_pixels)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
    elif new_width * new_height < size.min_pixels:
        grow = math.sqrt(size.min_pixels / (width * height))
        new_width = math.ceil(width * grow / factor) * factor
        new_height = math.ceil(height * grow / factor) * factor
    return new_width, new_height


def scale_frame(scaler: VideoReformatter, frame: VideoFrame, width: int, height: int, quarter_turns: int = 0) -> RGB:
    """Scale a decoded frame, then rotate it counterclockwise; rotating the smaller array is cheaper.

    Args:
        scaler: Reused by the frames of a video.
        frame: The decoded frame.
        width: Width of the result, after rotation.
        height: Height of the result, after rotation.
        quarter_turns: Rotation in units of 90 degrees.
    """
    if quarter_turns % 2:
        width, height = height, width
    scaled = scaler.reformat(
        frame,
        width=width,
        height=height,
        format="rgb24",
        interpolation=_FLAGS,
        dst_color_range=ColorRange.JPEG,
        threads=1,
    )
    rgb: RGB = np.ascontiguousarray(np.rot90(scaled.to_ndarray(), quarter_turns), dtype=np.uint8)
    rgb.flags.writeable = False
    return rgb
