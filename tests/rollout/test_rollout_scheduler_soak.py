"""Soak test: random kills on three nodes; every group completes and every sample is accepted once."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable

import psutil
import pytest
import pytest_asyncio

from tests.rollout.rollout_cluster import NODE_RESOURCES, RolloutCluster, open_rollout_cluster
from tests.small_run import survivors
from vz_ray.config.rollout import EngineConfig
from vz_ray.rollout.worker_handle import WorkerState

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(2400)]

NUM_FAULTS = 12
MAX_PAUSE_S = 20.0
"""Maximum pause before a fault, once two workers serve. The third often starts then, so that faults hit it too."""
RECOVERY_TIMEOUT_S = 900.0
"""Several engine starts one after another, as further faults hit replacements."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(
    tmp_path_factory: pytest.TempPathFactory, engine_config: EngineConfig
) -> AsyncIterator[RolloutCluster]:
    # Samples lose their workers much more often than in production.
    async with open_rollout_cluster(tmp_path_factory.mktemp("soak"), engine_config, workers=3, attempts=50) as opened:
        await opened.wait_all_serving()
        yield opened


async def test_two_of_three_nodes_fail_and_return(cluster: RolloutCluster) -> None:
    with cluster.decoders_stopped():
        rollout = cluster.start_rollout(6)
        await cluster.wait_until(lambda: sum(status.load for status in cluster.scheduler.pool.worker_statuses()) == 24)
        engines = cluster.nodes.actor_children("RolloutWorkerActor")
        for node in cluster.worker_nodes[:2]:
            cluster.nodes.kill(node)
        await cluster.wait_until(lambda: cluster.scheduler.pool.num_serving_workers == 1, 60)
    episodes = await cluster.finish_rollout(rollout)
    assert sum(episodes.values()) == 24
    cluster.worker_nodes[:2] = [cluster.nodes.add(**NODE_RESOURCES) for _ in range(2)]
    await cluster.wait_all_serving()
    report = await cluster.publish()
    assert len(report.updated) == 3
    assert set(await cluster.finish_rollout(cluster.start_rollout(12))) == set(report.updated)
    assert len([engine for engine in engines if engine.is_running()]) <= len(engines) / 3


class FaultSchedule:
    """Inject random faults."""

    def __init__(self, cluster: RolloutCluster, seed: int) -> None:
        self.cluster, self.random = cluster, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.engines: set[psutil.Process] = set()

    async def run(self) -> None:
        """Inject `NUM_FAULTS` faults, each while at least two workers serve, so that rollout proceeds."""
        kinds = (self.worker, self.engine, self.node, self.drained, self.decoder, self.publishing)
        pool = self.cluster.scheduler.pool
        for _ in range(NUM_FAULTS):
            await self.cluster.wait_until(lambda: pool.num_serving_workers >= 2, RECOVERY_TIMEOUT_S)
            await asyncio.sleep(self.random.uniform(0, MAX_PAUSE_S))
            self.engines.update(self.cluster.nodes.actor_children("RolloutWorkerActor"))
            self.random.choice(kinds)()

    def worker(self) -> None:
        self._kill("worker", self.cluster.nodes.actor_processes("RolloutWorkerActor"))

    def engine(self) -> None:
        self._kill("engine", self.cluster.nodes.actor_children("RolloutWorkerActor"))

    def decoder(self) -> None:
        self._kill("decoder", self.cluster.nodes.actor_processes("DecoderActor"))

    def publishing(self) -> None:
        """Kill a worker during the next publish."""
        self.cluster.faults.fault = self.worker

    def node(self) -> None:
        self.cluster.nodes.kill(self._replace_random_node())
        self.counts["node"] += 1

    def drained(self) -> None:
        self.cluster.nodes.drain(self._replace_random_node(), "reclaimed", notice_s=60)
        self.counts["drained"] += 1

    def _replace_random_node(self) -> object:
        """Remove a random node and start its replacement."""
        node = self.cluster.worker_nodes.pop(self.random.randrange(len(self.cluster.worker_nodes)))
        self.cluster.worker_nodes.append(self.cluster.nodes.add(**NODE_RESOURCES))
        return node

    def _kill(self, kind: str, processes: list[psutil.Process]) -> None:
        if processes:
            _ignore_exited(self.random.choice(processes).kill)
            self.counts[kind] += 1


def _ignore_exited(action: Callable[[], None]) -> None:
    try:
        action()
    except psutil.NoSuchProcess:
        return


async def test_soak_accepts_every_sample_once(cluster: RolloutCluster) -> None:
    schedule = FaultSchedule(cluster, seed=11)
    fault_task = asyncio.create_task(schedule.run())
    while not fault_task.done():
        rollout = cluster.start_rollout(12)
        await asyncio.sleep(schedule.random.uniform(0, 2))
        await cluster.publish()
        await cluster.finish_rollout(rollout, seconds=RECOVERY_TIMEOUT_S)
    await fault_task
    cluster.faults.fault = None
    await cluster.wait_all_serving(RECOVERY_TIMEOUT_S)
    engines = set(cluster.nodes.actor_children("RolloutWorkerActor"))
    report = await cluster.publish()
    assert len(report.updated) == 3
    assert set(await cluster.finish_rollout(cluster.start_rollout(12))) == set(report.updated)
    assert not survivors(list(schedule.engines - engines))
    assert sum(schedule.counts.values()) > NUM_FAULTS / 3
    assert any(status.state is WorkerState.DEAD for status in cluster.scheduler.pool.worker_statuses())
