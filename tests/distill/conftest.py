"""Needle tasks and the chat format of the tiny model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.needle.tiny_setup import EPISODE_CONFIG, build_chat_format, make_train_tasks
from vz_ray.config.episode import EpisodeConfig
from vz_ray.env.chat_format import ChatFormat
from vz_ray.env.task import Task


@pytest.fixture(scope="session")
def episode_config() -> EpisodeConfig:
    return EPISODE_CONFIG


@pytest.fixture(scope="session")
def needle_tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Task]:
    """Tasks on four videos. The oracle server finds the task id in the question."""
    tasks = make_train_tasks(tmp_path_factory.mktemp("needle"), videos=4, shot_s=[4, 8])
    return [replace(task, question=f"({task.task_id}) {task.question}") for task in tasks]


@pytest.fixture(scope="session")
def chat_format() -> ChatFormat:
    return build_chat_format()
