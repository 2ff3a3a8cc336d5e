"""A few needle videos, and the tiny model's tokenizer and rules."""

from __future__ import annotations

import pytest

from vz_ray.config.data import SynthConfig
from vz_ray.config.episode import EpisodeConfig
from vz_ray.data.task_file import read_tasks
from vz_ray.needle.base_training import make_tokenizer_corpus
from vz_ray.needle.synthesis import synthesize
from vz_ray.needle.tiny_model import build_tokenizer

RULES = EpisodeConfig(
    prompt="conf/prompt/tiny.yaml",
    max_zoom_frames=8,
    max_images=64,
    max_turn_tokens=64,
    max_context=2048,
    overview_frames=16,
    min_pixels=784,
    max_pixels=784,
)


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """Questions of every kind, about four videos of two lengths."""
    config = SynthConfig(
        directory=str(tmp_path_factory.mktemp("needle")),
        train=4,
        sft=0,
        validation=0,
        test=0,
        shot_s=[4, 16],
        workers=1,
    )
    return read_tasks(synthesize(config)["train"])


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer(make_tokenizer_corpus(), 1792)
