"""Actors whose node has another version of the code are refused at their start, on a real Ray.

Nothing but plain strings reaches them before: what is sent here could not be unpickled by them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.learner.rank_worker import small_config
from tests.learner.worlds import Album
from vz_ray.clips import ClipPool
from vz_ray.config.clips import ClipsConfig
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.config.rollout import RolloutConfig
from vz_ray.learner.actor import LearnerGroup
from vz_ray.observe.errors import UserError
from vz_ray.observe.fingerprint import fingerprint
from vz_ray.reward import score
from vz_ray.rollout.crew import FleetFailed
from vz_ray.rollout.fleet import Fleet
from vz_ray.rollout.remote import RayWorker
from vz_ray.rollout.worker import WorkerSetup
from vz_ray.weights import Publisher

pytestmark = pytest.mark.usefixtures("ray_session")

THERE = fingerprint()["vz_ray"]
REFUSED = f"on node \\S+ runs another version of the code: vz_ray {THERE} there, 9.9.9 in the driver"
REFUSED = REFUSED.replace("(", r"\(").replace(")", r"\)")


def _unknown() -> None:
    raise AttributeError("this version has no such class")


class Unknown(Album):
    """Frames of a class that only the driver's version has."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_unknown, ())


@pytest.fixture
def other_driver(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this process one of another version, as far as its actors can tell."""
    monkeypatch.setitem(fingerprint(), "vz_ray", "9.9.9")


@pytest.mark.usefixtures("other_driver")
async def test_a_learner_rank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^learner-rank-0 {REFUSED}"):
        await LearnerGroup.start(small_config(tmp_path, 0), Unknown({}))


@pytest.mark.usefixtures("other_driver")
async def test_a_clip_actor_is_refused_whatever_it_is_asked() -> None:
    pool = ClipPool.start(ClipsConfig(actors=1, cpus=0, disk_gb=0))
    try:
        with pytest.raises(UserError, match=f"^decode-actor-0 {REFUSED}"):
            await pool.ready()
        with pytest.raises(UserError, match=f"^decode-actor-0 {REFUSED}"):
            await pool.probe("video.mp4")
    finally:
        pool.close()


@pytest.mark.usefixtures("other_driver")
async def test_a_refused_rollout_worker_is_a_failed_start_and_the_fleet_says_why(tmp_path: Path) -> None:
    config = RolloutConfig(workers=1, cpus_per_worker=0.1)
    setup = WorkerSetup(
        "model", config, EpisodeConfig(), RewardConfig(), Unknown({}), score, str(tmp_path / "logs")
    )
    fleet = Fleet(lambda name: RayWorker(name, setup), config, Publisher(deadline_s=5), starts=2)
    with pytest.raises(
        FleetFailed, match=f"rollout-0: UserError: rollout-0 {REFUSED}.*; rollout-1: UserError"
    ):
        await fleet.start()
