"""Kills of a worker and of its engine while it publishes or generates on a GPU, through Ray.

The tests are those of the CPU suite, on nodes with a GPU.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.rollout.rollout_cluster import RolloutCluster, engine_processes, open_rollout_cluster
from tests.rollout.test_rollout_scheduler_nodes import (
    test_engine_kill_during_publish_is_recovered,
    test_worker_kill_during_publish_is_recovered,
)
from tests.small_run import survivors
from vz_ray.config.rollout import EngineConfig

__all__ = ["test_engine_kill_during_publish_is_recovered", "test_worker_kill_during_publish_is_recovered"]

pytestmark = [pytest.mark.gpu, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RolloutCluster]:
    engine = EngineConfig(dtype="bfloat16", kv_cache_gib=0.25, max_model_len=1024)
    async with open_rollout_cluster(tmp_path_factory.mktemp("nodes"), engine, gpus=True) as opened:
        yield opened


async def test_engine_kill_during_turns_is_recovered(cluster: RolloutCluster) -> None:
    rollout = cluster.start_rollout(4)
    victim = await cluster.wait_running(4)
    engines = engine_processes(victim)
    engines[0].kill()
    assert sum((await cluster.finish_rollout(rollout)).values()) == 16
    await cluster.check_replacement(cluster.scheduler.pool.version, victim.name)
    assert not survivors(engines)
