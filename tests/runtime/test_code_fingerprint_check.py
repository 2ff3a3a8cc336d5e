"""Actors with another code version fail at their start, on a real Ray.

The constructor arguments of these actors cannot be unpickled, so the check must run before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.learner.rank_worker import small_config
from tests.learner.training_data import InMemoryFrameSource
from vz_ray.config.clips import ClipsConfig
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.config.rollout import RolloutConfig
from vz_ray.decode import DecodePool
from vz_ray.learner.learner import Learner
from vz_ray.rewards import score_episode
from vz_ray.rollout.ray_worker import RayWorkerClient
from vz_ray.rollout.rollout_scheduler import RolloutScheduler
from vz_ray.rollout.rollout_worker import WorkerSetup
from vz_ray.rollout.worker_wait import NoWorkersError
from vz_ray.utils.code_fingerprint import code_fingerprint
from vz_ray.utils.errors import UserError
from vz_ray.weight_sync import WeightPublisher

pytestmark = pytest.mark.usefixtures("ray_session")

LOCAL_VERSION = code_fingerprint()["vz_ray"]
VERSION_ERROR = f"on node \\S+ runs another version of the code: vz_ray {LOCAL_VERSION} there, 9.9.9 in the driver"
VERSION_ERROR = VERSION_ERROR.replace("(", r"\(").replace(")", r"\)")


def _fail_to_unpickle() -> None:
    raise AttributeError("this version has no such class")


class UnknownFrameSource(InMemoryFrameSource):
    """Frame source whose class only exists in the driver's version."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_fail_to_unpickle, ())


@pytest.fixture
def other_driver(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this process another code version."""
    monkeypatch.setitem(code_fingerprint(), "vz_ray", "9.9.9")


@pytest.mark.usefixtures("other_driver")
async def test_learner_rank_of_another_version_fails(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^learner-rank-0 {VERSION_ERROR}"):
        await Learner.start(small_config(tmp_path, 0), UnknownFrameSource({}))


@pytest.mark.usefixtures("other_driver")
async def test_decoder_of_another_version_fails() -> None:
    pool = DecodePool.start(ClipsConfig(num_actors=1, cpus_per_actor=0, disk_cache_gib=0))
    try:
        with pytest.raises(UserError, match=f"^decoder-0 {VERSION_ERROR}"):
            await pool.wait_until_ready()
        with pytest.raises(UserError, match=f"^decoder-0 {VERSION_ERROR}"):
            await pool.probe("video.mp4")
    finally:
        pool.close()


@pytest.mark.usefixtures("other_driver")
async def test_rollout_worker_of_another_version_fails(tmp_path: Path) -> None:
    config = RolloutConfig(num_workers=1, cpus_per_worker=0.1)
    setup = WorkerSetup(
        "model",
        config,
        EpisodeConfig(),
        RewardConfig(),
        UnknownFrameSource({}),
        score_episode,
        str(tmp_path / "logs"),
    )
    scheduler = RolloutScheduler(
        lambda name: RayWorkerClient(name, setup), config, WeightPublisher(timeout_s=5), max_start_failures=2
    )
    with pytest.raises(
        NoWorkersError, match=f"rollout-0: UserError: rollout-0 {VERSION_ERROR}.*; rollout-1: UserError"
    ):
        await scheduler.pool.start()
