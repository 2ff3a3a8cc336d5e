"""The fleet on nodes that come and go: who is killed, at which moment, and that nothing is lost by it.

Whoever replaces the victim of one test is the victim of the next, since each engine costs seconds to start.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import psutil
import pytest
import pytest_asyncio

from tests.rollout.rollout_cluster import (
    NODE_RESOURCES,
    RolloutCluster,
    engine_processes,
    open_rollout_cluster,
)
from tests.small_run import survivors
from vz_ray.config.rollout import EngineConfig
from vz_ray.rollout.ray_worker import RayWorkerClient
from vz_ray.rollout.worker_handle import WorkerLostError, WorkerState, WorkerUnschedulableError

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(
    tmp_path_factory: pytest.TempPathFactory, engine_config: EngineConfig
) -> AsyncIterator[RolloutCluster]:
    async with open_rollout_cluster(tmp_path_factory.mktemp("nodes"), engine_config) as made:
        yield made


@pytest.mark.slow
async def test_idle_and_starting_worker_kills_are_recovered(
    world: RolloutCluster,
) -> None:
    victim = await world.serving_worker()
    engines = engine_processes(victim)
    psutil.Process(victim.pid).kill()
    await world.wait_until(lambda: world.worker_status(victim.name).state is WorkerState.DEAD, 20)
    await world.wait_until(lambda: bool(world.nodes.actor_children("RolloutWorkerActor")))
    (second,) = world.nodes.actor_processes("RolloutWorkerActor")
    engines += [second, *world.nodes.actor_children("RolloutWorkerActor")]
    second.kill()
    third = await world.check_replacement(1, victim.name)
    assert [seat.name for seat in world.scheduler.worker_statuses()].index(third) == 2
    assert not survivors(engines)


async def test_episodes_survive_decoder_kills(world: RolloutCluster) -> None:
    worker = await world.serving_worker()
    with world.decoders_stopped() as decoders:
        play = world.start_rollout(2)
        await world.wait_running(8)
        assert not play.done()
        for decoder in decoders:
            decoder.kill()
    assert await world.finish_rollout(play) == {worker.name: 8}
    assert not survivors(decoders)


async def test_worker_kill_during_publish_is_recovered(
    world: RolloutCluster,
) -> None:
    with world.decoders_stopped():
        play = world.start_rollout(4)
        victim = await world.wait_running(8)
        engines = engine_processes(victim)
        world.trap.fault = psutil.Process(victim.pid).kill
        report = await world.publish()
    assert (report.updated, list(report.failed)) == ((), [victim.name])
    assert "its worker process has died" in report.failed[victim.name]
    players = await world.finish_rollout(play)
    assert sum(players.values()) == 16
    assert victim.name not in players
    await world.check_replacement(report.version, victim.name)
    assert not survivors(engines)


@pytest.mark.slow
async def test_engine_kill_during_publish_is_recovered(world: RolloutCluster) -> None:
    with world.decoders_stopped():
        play = world.start_rollout(4)
        victim = await world.wait_running(8)
        actor, (engine, *others) = psutil.Process(victim.pid), engine_processes(victim)
        world.trap.fault = engine.kill
        report = await world.publish()
    assert (report.updated, list(report.failed)) == ((), [victim.name])
    assert "did not finish" not in report.failed[victim.name]  # nobody waited for the deadline
    assert victim.name not in await world.finish_rollout(play)
    await world.check_replacement(report.version, victim.name)
    assert not survivors([actor, engine, *others])


async def test_drained_node_finishes_its_episodes(
    world: RolloutCluster,
) -> None:
    old, version = world.worker_nodes[-1], world.scheduler.version
    world.worker_nodes.append(world.nodes.add(**NODE_RESOURCES))
    with world.decoders_stopped():
        begun = world.start_rollout(1)
        leaving = await world.wait_running(4)
        engines = engine_processes(leaving)
        world.nodes.drain(old, "reclaimed", notice_s=600)
        await world.wait_until(lambda: world.worker_status(leaving.name).state is WorkerState.DRAINING, 20)
        later = world.start_rollout(2)
    assert await world.finish_rollout(begun) == {leaving.name: 4}
    (other,) = await world.finish_rollout(later)
    assert other != leaving.name
    assert await world.check_replacement(version, leaving.name) == other
    assert world.worker_status(leaving.name).reason == "its node is about to go"
    assert not survivors(engines)
    await world.wait_until(lambda: world.nodes.is_gone(old), 30)


@pytest.mark.slow
async def test_groups_wait_for_a_node(world: RolloutCluster, caplog: pytest.LogCaptureFixture) -> None:
    version = world.scheduler.version
    with world.decoders_stopped():
        play = world.start_rollout(4)
        victim = await world.wait_running(8)
        engines = engine_processes(victim)
        world.nodes.kill(world.worker_nodes[-1])
        await world.wait_until(lambda: world.worker_status(victim.name).state is WorkerState.DEAD, 20)
    assert "its node has died" in world.worker_status(victim.name).reason
    await world.wait_until(lambda: "8 episodes wait, and 2 groups in part" in caplog.text, 20)
    assert not survivors(engines)
    assert not play.done()
    world.worker_nodes.append(world.nodes.add(**NODE_RESOURCES))
    assert victim.name not in await world.finish_rollout(play)
    await world.check_replacement(version, victim.name)


async def test_unschedulable_worker_names_missing_resources(
    world: RolloutCluster,
) -> None:
    world.nodes.add(num_cpus=4, num_gpus=2)
    setup = world.setup
    engine = replace(setup.rollout.engine, tensor_parallel_size=4)
    wide = replace(setup, rollout=replace(setup.rollout, engine=engine, start_timeout_s=2))
    worker = RayWorkerClient("wide", wide, gpus=True)
    with pytest.raises(WorkerUnschedulableError) as refused:
        await worker.start()
    assert str(refused.value) == (
        "wide found no place within 1 s: it needs 1.5 CPU and 4 GPU on one node, and no node has 4 GPU, "
        "the largest node has 4 CPU and 2 GPU: lower rollout.engine.tensor_parallel_size, "
        "or add a larger node"
    )
    await worker.terminate()
    with pytest.raises(WorkerLostError, match="killed by"):
        await worker.check_health()
