"""The fleet on nodes that come and go: who is killed, at which moment, and that nothing is lost by it.

Whoever replaces the victim of one test is the victim of the next, since each engine costs seconds to start.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import psutil
import pytest
import pytest_asyncio

from tests.rollout.world import NODE, World, engines_of, opened
from tests.small_run import left_of
from vz_ray.config.rollout import EngineConfig
from vz_ray.rollout.member import NoPlace, WorkerLost
from vz_ray.rollout.remote import RayWorker
from vz_ray.rollout.state import WorkerState

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(
    tmp_path_factory: pytest.TempPathFactory, engine_config: EngineConfig
) -> AsyncIterator[World]:
    async with opened(tmp_path_factory.mktemp("nodes"), engine_config) as made:
        yield made


@pytest.mark.slow
async def test_one_killed_while_idle_is_found_and_replaced_though_the_next_dies_while_it_starts(
    world: World,
) -> None:
    victim = await world.worker()
    engines = engines_of(victim)
    psutil.Process(victim.pid).kill()
    await world.until(lambda: world.seat(victim.name).state is WorkerState.DEAD, 20)
    await world.until(lambda: bool(world.nodes.below("WorkerActor")))
    (second,) = world.nodes.actors("WorkerActor")
    engines += [second, *world.nodes.below("WorkerActor")]
    second.kill()
    third = await world.plays_on(1, victim.name)
    assert [seat.name for seat in world.fleet.seats()].index(third) == 2
    assert not left_of(engines)


async def test_episodes_outlive_the_decoders_that_they_wait_for(world: World) -> None:
    worker = await world.worker()
    with world.held() as decoders:
        play = world.begin(2)
        await world.playing(8)
        assert not play.done()
        for decoder in decoders:
            decoder.kill()
    assert await world.end(play) == {worker.name: 8}
    assert not left_of(decoders)


async def test_one_killed_between_pause_and_resume_is_replaced_and_its_episodes_are_played_again(
    world: World,
) -> None:
    with world.held():
        play = world.begin(4)
        victim = await world.playing(8)
        engines = engines_of(victim)
        world.trap.spring = psutil.Process(victim.pid).kill
        report = await world.publish()
    assert (report.updated, list(report.failed)) == ((), [victim.name])
    assert "its worker process has died" in report.failed[victim.name]
    players = await world.end(play)
    assert sum(players.values()) == 16
    assert victim.name not in players
    await world.plays_on(report.version, victim.name)
    assert not left_of(engines)


@pytest.mark.slow
async def test_one_whose_engine_is_killed_between_pause_and_resume_is_replaced(world: World) -> None:
    with world.held():
        play = world.begin(4)
        victim = await world.playing(8)
        actor, (engine, *others) = psutil.Process(victim.pid), engines_of(victim)
        world.trap.spring = engine.kill
        report = await world.publish()
    assert (report.updated, list(report.failed)) == ((), [victim.name])
    assert "did not finish" not in report.failed[victim.name]  # nobody waited for the deadline
    assert victim.name not in await world.end(play)
    await world.plays_on(report.version, victim.name)
    assert not left_of([actor, engine, *others])


async def test_one_on_a_drained_node_ends_what_it_plays_while_another_comes_elsewhere(world: World) -> None:
    old, version = world.places[-1], world.fleet.version
    world.places.append(world.nodes.add(**NODE))
    with world.held():
        begun = world.begin(1)
        leaving = await world.playing(4)
        engines = engines_of(leaving)
        world.nodes.drain(old, "reclaimed", seconds=600)
        await world.until(lambda: world.seat(leaving.name).state is WorkerState.DRAINING, 20)
        later = world.begin(2)
    assert await world.end(begun) == {leaving.name: 4}
    (other,) = await world.end(later)
    assert other != leaving.name
    assert await world.plays_on(version, leaving.name) == other
    assert world.seat(leaving.name).why == "its node is about to go"
    assert not left_of(engines)
    await world.until(lambda: world.nodes.gone(old), 30)


@pytest.mark.slow
async def test_groups_wait_while_there_is_no_node_and_are_played_on_the_next_that_comes(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    version = world.fleet.version
    with world.held():
        play = world.begin(4)
        victim = await world.playing(8)
        engines = engines_of(victim)
        world.nodes.kill(world.places[-1])
        await world.until(lambda: world.seat(victim.name).state is WorkerState.DEAD, 20)
    assert "its node has died" in world.seat(victim.name).why
    await world.until(lambda: "8 episodes wait, and 2 groups in part" in caplog.text, 20)
    assert not left_of(engines)
    assert not play.done()
    world.places.append(world.nodes.add(**NODE))
    assert victim.name not in await world.end(play)
    await world.plays_on(version, victim.name)


async def test_a_worker_that_no_node_has_room_for_says_what_is_lacking_and_asks_no_longer(
    world: World,
) -> None:
    world.nodes.add(num_cpus=4, num_gpus=2)
    setup = world.setup
    engine = replace(setup.rollout.engine, tensor_parallel=4)
    wide = replace(setup, rollout=replace(setup.rollout, engine=engine, start_deadline_s=2))
    worker = RayWorker("wide", wide, gpus=True)
    with pytest.raises(NoPlace) as refused:
        await worker.start()
    assert str(refused.value) == (
        "wide found no place within 1 s: it needs 1.5 CPU and 4 GPU on one node, and no node has 4 GPU, "
        "the largest node has 4 CPU and 2 GPU: lower rollout.engine.tensor_parallel, or add a larger node"
    )
    await worker.end()
    with pytest.raises(WorkerLost, match="killed by"):
        await worker.check()
