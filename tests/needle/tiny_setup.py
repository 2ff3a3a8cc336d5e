"""Episode config, needle tasks and chat format for tests with the tiny model."""

from __future__ import annotations

from pathlib import Path

from vz_ray.config.data import SynthConfig
from vz_ray.config.episode import EpisodeConfig
from vz_ray.data.task_file import read_tasks
from vz_ray.env.chat_format import ChatFormat, PromptTemplate
from vz_ray.env.task import Task
from vz_ray.needle.base_training import make_tokenizer_corpus
from vz_ray.needle.synthesis import synthesize
from vz_ray.needle.tiny_model import build_tokenizer
from vz_ray.video.image_grid import ImageGrid

EPISODE_CONFIG = EpisodeConfig(
    prompt="conf/prompt/tiny.yaml",
    max_zoom_frames=8,
    max_images=64,
    max_turn_tokens=64,
    max_context=2048,
    overview_frames=16,
    min_pixels=784,
    max_pixels=784,
)


def make_train_tasks(directory: Path, videos: int, shot_s: list[int]) -> list[Task]:
    """Synthesize training videos of the given shot lengths and read their tasks."""
    config = SynthConfig(directory=str(directory), train=videos, sft=0, validation=0, test=0, shot_s=shot_s, workers=1)
    return read_tasks(synthesize(config)["train"])


def build_chat_format() -> ChatFormat:
    return ChatFormat(
        build_tokenizer(make_tokenizer_corpus(), 1792),
        PromptTemplate.load(EPISODE_CONFIG.prompt),
        grid=ImageGrid(14, 2),
    )
