"""The size at which a frame is delivered."""

from __future__ import annotations

import math

from vz_ray.video.errors import VideoLimitExceededError
from vz_ray.video.frame import FrameSize

_MOST_ELONGATED = 200
_MOST_REPEATS = 16


def target_size(width: int, height: int, size: FrameSize) -> tuple[int, int]:
    """`(width, height)` that the Qwen-VL image processor would resize a frame of this size to.

    Both sides are multiples of `size.factor`, the area lies within the bounds
    of `size`, and the processor's own resize is the identity on the result
    (source: the resize rule of the Qwen2-VL image processor). On frames far
    longer than wide the rule does not settle at once; it is then repeated.

    Raises:
        OverLimit: One side is more than 200 times the other; the model's processor refuses that.

    Example:
        >>> target_size(640, 360, FrameSize())
        (420, 224)
    """
    chosen = width, height
    for _ in range(_MOST_REPEATS):
        # Rounding to multiples of the factor can stretch a frame beyond what was allowed before it.
        if max(chosen) > _MOST_ELONGATED * min(chosen):
            raise VideoLimitExceededError(
                f"a frame of {width}x{height} is more than {_MOST_ELONGATED} times longer than wide "
                f"(shown at {chosen[0]}x{chosen[1]})",
                "the video's frames are too elongated to be shown",
            )
        again = _resized(*chosen, size)
        if again == chosen:
            return chosen
        chosen = again
    raise ValueError(f"no size for frames of {width}x{height} lies within {size}; widen its bounds")


def _resized(width: int, height: int, size: FrameSize) -> tuple[int, int]:
    factor = size.factor
    wide, high = round(width / factor) * factor, round(height / factor) * factor
    if wide * high > size.max_pixels:
        shrink = math.sqrt(width * height / size.max_pixels)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
        high = max(factor, math.floor(height / shrink / factor) * factor)
    elif wide * high < size.min_pixels:
        grow = math.sqrt(size.min_pixels / (width * height))
        wide = math.ceil(width * grow / factor) * factor
        high = math.ceil(height * grow / factor) * factor
    return wide, high
