"""Target size compared with the Qwen2-VL image processor."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from vz_ray.video.errors import VideoLimitExceededError
from vz_ray.video.frame import FrameSize
from vz_ray.video.frame_scaling import target_size

SIZES = [
    FrameSize(25_088, 100_352, 28),
    FrameSize(28 * 28, 28 * 28, 28),
    FrameSize(56 * 56, 14 * 14 * 4 * 1280, 28),
    FrameSize(1024, 262144, 32),
]


@settings(max_examples=2000, deadline=None)
@example(29, 5615, FrameSize(25_088, 100_352, 28))
@given(st.integers(16, 8192), st.integers(16, 8192), st.sampled_from(SIZES))
def test_target_size_is_stable_under_the_processor(width: int, height: int, size: FrameSize) -> None:
    expected = processor_fixed_point(width, height, size)
    if expected is None:
        with pytest.raises(VideoLimitExceededError, match=r"aspect ratio .* exceeds 200"):
            target_size(width, height, size)
    else:
        assert target_size(width, height, size) == expected


def processor_fixed_point(width: int, height: int, size: FrameSize) -> tuple[int, int] | None:
    """Apply the processor until the size is stable; None if it rejects a size."""
    previous = (0, 0)
    while previous != (width, height):
        previous = width, height
        try:
            width, height = processor_size(width, height, size)
        except ValueError:
            return None
    return previous


def processor_size(width: int, height: int, size: FrameSize) -> tuple[int, int]:
    new_height, new_width = smart_resize(height, width, size.factor, size.min_pixels, size.max_pixels)
    return new_width, new_height


@pytest.mark.parametrize("size", SIZES)
def test_common_shapes_equal_one_processor_resize(size: FrameSize) -> None:
    for width, height in [(640, 360), (1920, 1080), (112, 112), (360, 640), (1024, 768), (64, 64)]:
        assert target_size(width, height, size) == processor_size(width, height, size)
