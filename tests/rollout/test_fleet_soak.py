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

from tests.rollout.world import NODE, World, opened
from tests.small_run import left_of
from vz_ray.config.rollout import EngineConfig
from vz_ray.rollout.state import WorkerState

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(2400)]

SOAK_S = 300.0
BETWEEN_S = (10.0, 40.0)
"""Between two kills; an engine takes about as long to start, so that many are killed while they do."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(
    tmp_path_factory: pytest.TempPathFactory, engine_config: EngineConfig
) -> AsyncIterator[World]:
    # A sample may lose its worker more often than one would let pass for bad luck.
    async with opened(tmp_path_factory.mktemp("soak"), engine_config, workers=3, attempts=50) as made:
        await made.all_serve()
        yield made


async def test_two_of_three_nodes_go_at_once_and_come_back(world: World) -> None:
    with world.held():
        play = world.begin(6)
        await world.until(lambda: sum(seat.load for seat in world.fleet.seats()) == 24)
        engines = world.nodes.below("WorkerActor")
        for node in world.places[:2]:
            world.nodes.kill(node)
        await world.until(lambda: world.fleet.size == 1, 60)
    players = await world.end(play)
    assert sum(players.values()) == 24
    world.places[:2] = [world.nodes.add(**NODE) for _ in range(2)]
    await world.all_serve()
    report = await world.publish()
    assert len(report.updated) == 3
    assert set(await world.end(world.begin(12))) == set(report.updated)
    assert len([engine for engine in engines if engine.is_running()]) <= len(engines) / 3


class Striker:
    """Kills something of the world now and then."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.random = world, random.Random(seed)
        self.struck: Counter[str] = Counter()
        self.engines: set[psutil.Process] = set()

    async def strike(self, until_s: float) -> None:
        kinds = (self.worker, self.engine, self.node, self.drained, self.decoder, self.publishing)
        while (left := until_s - time.monotonic()) > 0:
            await asyncio.sleep(min(left, self.random.uniform(*BETWEEN_S)))
            self.engines.update(self.world.nodes.below("WorkerActor"))
            self.random.choice(kinds)()

    def worker(self) -> None:
        self._kill("worker", self.world.nodes.actors("WorkerActor"))

    def engine(self) -> None:
        self._kill("engine", self.world.nodes.below("WorkerActor"))

    def decoder(self) -> None:
        self._kill("decoder", self.world.nodes.actors("DecodeActor"))

    def publishing(self) -> None:
        """At the next publish, some worker is killed when the first is about to receive."""
        self.world.trap.spring = self.worker

    def node(self) -> None:
        self.world.nodes.kill(self._taken())
        self.struck["node"] += 1

    def drained(self) -> None:
        self.world.nodes.drain(self._taken(), "reclaimed", seconds=60)
        self.struck["drained"] += 1

    def _taken(self) -> object:
        """A node that another one takes the place of."""
        node = self.world.places.pop(self.random.randrange(len(self.world.places)))
        self.world.places.append(self.world.nodes.add(**NODE))
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


async def test_whatever_is_killed_for_minutes_every_sample_counts_once(world: World) -> None:
    end = time.monotonic() + SOAK_S
    striker = Striker(world, seed=11)
    striking = asyncio.create_task(striker.strike(end))
    while time.monotonic() < end:
        play = world.begin(12)
        await asyncio.sleep(striker.random.uniform(0, 2))
        await world.publish()
        await world.end(play)
    await striking
    world.trap.spring = None
    await world.all_serve()
    engines = set(world.nodes.below("WorkerActor"))
    report = await world.publish()
    assert len(report.updated) == 3
    assert set(await world.end(world.begin(12))) == set(report.updated)
    assert not left_of(list(striker.engines - engines))
    assert sum(striker.struck.values()) > 3
    assert any(seat.state is WorkerState.DEAD for seat in world.fleet.seats())
