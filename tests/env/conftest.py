"""Tiny tokenizer, chat formats and synthetic frames."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from vz_ray.env.chat_format import ChatFormat, PromptTemplate
from vz_ray.needle.tiny_model import build_tokenizer
from vz_ray.video.frame import Clip, Frame, FrameRef, OverviewRequest, VideoInfo, ZoomRequest
from vz_ray.video.image_grid import ImageGrid

GRID = ImageGrid(patch_size=14, merge_size=2)
SAMPLES = [
    '<think>red border at 12.00.</think><video_zoom>{"segment": [12.00, 24.00], "fps": 1}</video_zoom>',
    "<frame0_time12.00s><tool_response></tool_response><answer>A</answer>",
]


def make_frame(time_s: float, width: int = 28, height: int = 28) -> Frame:
    rng = np.random.default_rng(int(time_s * 1000))
    rgb = rng.integers(0, 255, (height, width, 3), np.uint8)
    digest = hashlib.blake2s(rgb.tobytes()).hexdigest()
    return Frame(FrameRef("blake3:0", "v.mp4", 0, time_s, width, height, "none", "none", digest), rgb)


def make_clip(times: list[float], request: OverviewRequest | ZoomRequest | None = None, **size: int) -> Clip:
    return Clip(request or OverviewRequest(), tuple(make_frame(t, **size) for t in times))


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer(SAMPLES, 1600)


@pytest.fixture(scope="session")
def chat_format(tokenizer):
    return ChatFormat(tokenizer, PromptTemplate.load("conf/prompt/tiny.yaml"), grid=GRID)


@pytest.fixture(scope="session")
def compat_chat_format(tokenizer):
    return ChatFormat(tokenizer, PromptTemplate.load("conf/prompt/compat.yaml"), grid=GRID, compat=True)


@pytest.fixture
def video():
    return VideoInfo("blake3:0", "v.mp4", 0, 64.0, 8.0, 112, 112)
