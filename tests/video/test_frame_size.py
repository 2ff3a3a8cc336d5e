"""The delivered size is the one that the model's own processor would choose."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from vz_ray.video.errors import VideoLimitExceededError
from vz_ray.video.frame import FrameSize
from vz_ray.video.frame_size import target_size

SIZES = [
    FrameSize(),
    FrameSize(28 * 28, 28 * 28),
    FrameSize(56 * 56, 14 * 14 * 4 * 1280),
    FrameSize(1024, 262144, 32),
]


@settings(max_examples=2000, deadline=None)
@example(29, 5615, FrameSize())
@given(st.integers(16, 8192), st.integers(16, 8192), st.sampled_from(SIZES))
def test_it_is_the_processors_choice_and_final(width: int, height: int, size: FrameSize) -> None:
    settled = processors_last_choice(width, height, size)
    if settled is None:
        with pytest.raises(VideoLimitExceededError, match="more than 200 times"):
            target_size(width, height, size)
    else:
        assert target_size(width, height, size) == settled


def processors_last_choice(width: int, height: int, size: FrameSize) -> tuple[int, int] | None:
    """What the processor leaves as it is after choosing again and again; none if it refuses on the way."""
    before = (0, 0)
    while before != (width, height):
        before = width, height
        try:
            width, height = processors_choice(width, height, size)
        except ValueError:
            return None
    return before


def processors_choice(width: int, height: int, size: FrameSize) -> tuple[int, int]:
    high, wide = smart_resize(height, width, size.factor, size.min_pixels, size.max_pixels)
    return wide, high


@pytest.mark.parametrize("size", SIZES)
def test_at_common_shapes_the_processors_choice_is_taken_as_it_is(size: FrameSize) -> None:
    for width, height in [(640, 360), (1920, 1080), (112, 112), (360, 640), (1024, 768), (64, 64)]:
        assert target_size(width, height, size) == processors_choice(width, height, size)
