"""Minutes of kills at random moments on three nodes: every group complete, every sample counted once."""

from __future__ import annotations

import asyncio
import random
import time
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

SOAK_S = 300.0
BETWEEN_S = (10.0, 40.0)
"""Between two kills; an engine takes about as long to start, so that many are killed while they do."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(
    tmp_path_factory: pytest.TempPathFactory, engine_config: EngineConfig
) -> AsyncIterator[RolloutCluster]:
    # A sample may lose its worker more often than one would let pass for bad luck.
    async with open_rollout_cluster(
        tmp_path_factory.mktemp("soak"), engine_config, workers=3, attempts=50
    ) as made:
        await made.wait_all_serving()
        yield made


async def test_two_of_three_nodes_fail_and_return(world: RolloutCluster) -> None:
    with world.decoders_stopped():
        play = world.start_rollout(6)
        await world.wait_until(lambda: sum(seat.load for seat in world.scheduler.worker_statuses()) == 24)
        engines = world.nodes.actor_children("RolloutWorkerActor")
        for node in world.worker_nodes[:2]:
            world.nodes.kill(node)
        await world.wait_until(lambda: world.scheduler.num_serving_workers == 1, 60)
    players = await world.finish_rollout(play)
    assert sum(players.values()) == 24
    world.worker_nodes[:2] = [world.nodes.add(**NODE_RESOURCES) for _ in range(2)]
    await world.wait_all_serving()
    report = await world.publish()
    assert len(report.updated) == 3
    assert set(await world.finish_rollout(world.start_rollout(12))) == set(report.updated)
    assert len([engine for engine in engines if engine.is_running()]) <= len(engines) / 3


class FaultSchedule:
    """Kills something of the world now and then."""

    def __init__(self, world: RolloutCluster, seed: int) -> None:
        self.world, self.random = world, random.Random(seed)
        self.struck: Counter[str] = Counter()
        self.engines: set[psutil.Process] = set()

    async def strike(self, until_s: float) -> None:
        kinds = (self.worker, self.engine, self.node, self.drained, self.decoder, self.publishing)
        while (left := until_s - time.monotonic()) > 0:
            await asyncio.sleep(min(left, self.random.uniform(*BETWEEN_S)))
            self.engines.update(self.world.nodes.actor_children("RolloutWorkerActor"))
            self.random.choice(kinds)()

    def worker(self) -> None:
        self._kill("worker", self.world.nodes.actor_processes("RolloutWorkerActor"))

    def engine(self) -> None:
        self._kill("engine", self.world.nodes.actor_children("RolloutWorkerActor"))

    def decoder(self) -> None:
        self._kill("decoder", self.world.nodes.actor_processes("DecodeActor"))

    def publishing(self) -> None:
        """At the next publish, some worker is killed when the first is about to receive."""
        self.world.trap.fault = self.worker

    def node(self) -> None:
        self.world.nodes.kill(self._taken())
        self.struck["node"] += 1

    def drained(self) -> None:
        self.world.nodes.drain(self._taken(), "reclaimed", notice_s=60)
        self.struck["drained"] += 1

    def _taken(self) -> object:
        """A node that another one takes the place of."""
        node = self.world.worker_nodes.pop(self.random.randrange(len(self.world.worker_nodes)))
        self.world.worker_nodes.append(self.world.nodes.add(**NODE_RESOURCES))
        return node

    def _kill(self, what: str, among: list[psutil.Process]) -> None:
        if among:
            _quietly(self.random.choice(among).kill)
            self.struck[what] += 1


def _quietly(action: Callable[[], None]) -> None:
    try:
        action()
    except psutil.NoSuchProcess:
        return  # it has just ended


async def test_soak_accepts_every_sample_once(world: RolloutCluster) -> None:
    end = time.monotonic() + SOAK_S
    striker = FaultSchedule(world, seed=11)
    striking = asyncio.create_task(striker.strike(end))
    while time.monotonic() < end:
        play = world.start_rollout(12)
        await asyncio.sleep(striker.random.uniform(0, 2))
        await world.publish()
        await world.finish_rollout(play)
    await striking
    world.trap.fault = None
    await world.wait_all_serving()
    engines = set(world.nodes.actor_children("RolloutWorkerActor"))
    report = await world.publish()
    assert len(report.updated) == 3
    assert set(await world.finish_rollout(world.start_rollout(12))) == set(report.updated)
    assert not survivors(list(striker.engines - engines))
    assert sum(striker.struck.values()) > 3
    assert any(seat.state is WorkerState.DEAD for seat in world.scheduler.worker_statuses())
