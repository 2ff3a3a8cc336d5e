"""A learner rank or rollout worker that Ray ends because its node lacks memory is lost like any other."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tests.learner.rank_worker import small_config
from tests.learner.worlds import Album
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.config.rollout import RolloutConfig
from vz_ray.learner.actor import LearnerGroup, LearnerLost
from vz_ray.reward import score
from vz_ray.rollout.crew import WorkerLost
from vz_ray.rollout.remote import RayWorker
from vz_ray.rollout.worker import WorkerSetup

LOW = "killed due to the node running low on memory"


@pytest.fixture(scope="module", autouse=True)
def low_memory() -> Iterator[None]:
    """A Ray whose node always has too little: it ends whatever runs."""
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


async def test_a_learner_rank_is_lost(tmp_path: Path) -> None:
    with pytest.raises(LearnerLost, match=f"learner-rank-0 died during .*{LOW}"):
        await LearnerGroup.start(small_config(tmp_path, 0), Album({}))


async def test_a_rollout_worker_is_lost(tmp_path: Path) -> None:
    setup = WorkerSetup(
        "model", RolloutConfig(), EpisodeConfig(), RewardConfig(), Album({}), score, str(tmp_path / "logs")
    )
    worker = RayWorker("rollout-0", setup)
    with pytest.raises(WorkerLost, match=r"rollout-0 died during .*OOM kill reason: Memory usage"):
        await worker.start()
