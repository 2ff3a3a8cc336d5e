"""Actors whose node has another version of the code are refused at their start, on a real Ray.

Nothing but plain strings reaches them before: what is sent here could not be unpickled by them.
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
from vz_ray.rollout.worker_pool import NoWorkersError
from vz_ray.utils.code_fingerprint import code_fingerprint
from vz_ray.utils.errors import UserError
from vz_ray.weight_sync import WeightPublisher

pytestmark = pytest.mark.usefixtures("ray_session")

THERE = code_fingerprint()["vz_ray"]
REFUSED = f"on node \\S+ runs another version of the code: vz_ray {THERE} there, 9.9.9 in the driver"
REFUSED = REFUSED.replace("(", r"\(").replace(")", r"\)")


def _unknown() -> None:
    raise AttributeError("this version has no such class")


class Unknown(InMemoryFrameSource):
    """Frames of a class that only the driver's version has."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_unknown, ())


@pytest.fixture
def other_driver(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this process one of another version, as far as its actors can tell."""
    monkeypatch.setitem(code_fingerprint(), "vz_ray", "9.9.9")


@pytest.mark.usefixtures("other_driver")
async def test_a_learner_rank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^learner-rank-0 {REFUSED}"):
        await Learner.start(small_config(tmp_path, 0), Unknown({}))


@pytest.mark.usefixtures("other_driver")
async def test_a_clip_actor_is_refused_whatever_it_is_asked() -> None:
    pool = DecodePool.start(ClipsConfig(num_actors=1, cpus_per_actor=0, disk_cache_gib=0))
    try:
        with pytest.raises(UserError, match=f"^decoder-0 {REFUSED}"):
            await pool.wait_until_ready()
        with pytest.raises(UserError, match=f"^decoder-0 {REFUSED}"):
            await pool.probe("video.mp4")
    finally:
        pool.close()


@pytest.mark.usefixtures("other_driver")
async def test_a_refused_rollout_worker_is_a_failed_start_and_the_fleet_says_why(tmp_path: Path) -> None:
    config = RolloutConfig(num_workers=1, cpus_per_worker=0.1)
    setup = WorkerSetup(
        "model", config, EpisodeConfig(), RewardConfig(), Unknown({}), score_episode, str(tmp_path / "logs")
    )
    fleet = RolloutScheduler(
        lambda name: RayWorkerClient(name, setup), config, WeightPublisher(timeout_s=5), max_start_failures=2
    )
    with pytest.raises(
        NoWorkersError, match=f"rollout-0: UserError: rollout-0 {REFUSED}.*; rollout-1: UserError"
    ):
        await fleet.start()
