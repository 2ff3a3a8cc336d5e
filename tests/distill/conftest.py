"""A few needle videos, and the wire format of the tiny model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vz_ray.config.data import SynthConfig
from vz_ray.config.episode import EpisodeConfig
from vz_ray.data.task_file import read_tasks
from vz_ray.env.chat_format import ChatFormat, PromptTemplate
from vz_ray.env.task import Task
from vz_ray.needle.base_training import make_tokenizer_corpus
from vz_ray.needle.synthesis import synthesize
from vz_ray.needle.tiny_model import build_tokenizer

RULES = EpisodeConfig(
    prompt="conf/prompt/tiny.yaml",
    max_zoom_frames=8,
    max_images=64,
    max_context=2048,
    max_turn_tokens=64,
    overview_frames=16,
    min_pixels=784,
    max_pixels=784,
)


@pytest.fixture(scope="session")
def rules() -> EpisodeConfig:
    return RULES


@pytest.fixture(scope="session")
def needle_tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Task]:
    """Questions about four videos, each worded so that a server can tell them apart."""
    config = SynthConfig(
        directory=str(tmp_path_factory.mktemp("needle")),
        train=4,
        sft=0,
        validation=0,
        test=0,
        shot_s=[4, 8],
        workers=1,
    )
    tasks = read_tasks(synthesize(config)["train"])
    return [replace(task, question=f"({task.task_id}) {task.question}") for task in tasks]


@pytest.fixture(scope="session")
def tiny_wire() -> ChatFormat:
    return ChatFormat(build_tokenizer(make_tokenizer_corpus(), 1792), PromptTemplate.load(RULES.prompt))
