"""Learner ranks and rollout workers that Ray kills for memory are reported as lost."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tests.learner.rank_worker import small_config
from tests.learner.training_data import InMemoryFrameSource
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.config.rollout import RolloutConfig
from vz_ray.learner.learner import Learner, LearnerDiedError
from vz_ray.rewards import score_episode
from vz_ray.rollout.ray_worker import RayWorkerClient
from vz_ray.rollout.rollout_worker import WorkerSetup
from vz_ray.rollout.worker_handle import WorkerLostError

LOW_MEMORY = "killed due to the node running low on memory"


@pytest.fixture(scope="module", autouse=True)
def low_memory() -> Iterator[None]:
    """Ray whose memory monitor kills every worker."""
    folder = tempfile.mkdtemp(prefix="vz_ray_")
    monitor = {"memory_usage_threshold": 0.001, "memory_monitor_refresh_ms": 100}
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        configure_logging=False,
        _temp_dir=folder,
        _system_config=monitor,
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


async def test_killed_learner_rank_is_lost(tmp_path: Path) -> None:
    with pytest.raises(LearnerDiedError, match=f"learner-rank-0 died during .*{LOW_MEMORY}"):
        await Learner.start(small_config(tmp_path, 0), InMemoryFrameSource({}))


async def test_killed_rollout_worker_is_lost(tmp_path: Path) -> None:
    setup = WorkerSetup(
        "model",
        RolloutConfig(),
        EpisodeConfig(),
        RewardConfig(),
        InMemoryFrameSource({}),
        score_episode,
        str(tmp_path / "logs"),
    )
    worker = RayWorkerClient("rollout-0", setup)
    with pytest.raises(WorkerLostError, match=r"rollout-0 died during .*OOM kill reason: Memory usage"):
        await worker.start()
