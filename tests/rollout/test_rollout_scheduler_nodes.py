"""Worker, engine, decoder and node failures on several Ray nodes lose no samples.

The replacement of one test's victim is the next test's victim, because each engine takes seconds to start.
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
async def cluster(
    tmp_path_factory: pytest.TempPathFactory, engine_config: EngineConfig
) -> AsyncIterator[RolloutCluster]:
    async with open_rollout_cluster(tmp_path_factory.mktemp("nodes"), engine_config) as opened:
        yield opened


@pytest.mark.slow
async def test_idle_and_starting_worker_kills_are_recovered(
    cluster: RolloutCluster,
) -> None:
    victim = await cluster.serving_worker()
    engines = engine_processes(victim)
    psutil.Process(victim.pid).kill()
    await cluster.wait_until(lambda: cluster.worker_status(victim.name).state is WorkerState.DEAD, 20)
    await cluster.wait_until(lambda: bool(cluster.nodes.actor_children("RolloutWorkerActor")))
    (second,) = cluster.nodes.actor_processes("RolloutWorkerActor")
    engines += [second, *cluster.nodes.actor_children("RolloutWorkerActor")]
    second.kill()
    third = await cluster.check_replacement(1, victim.name)
    assert [status.name for status in cluster.scheduler.pool.worker_statuses()].index(third) == 2
    assert not survivors(engines)


async def test_episodes_survive_decoder_kills(cluster: RolloutCluster) -> None:
    worker = await cluster.serving_worker()
    with cluster.decoders_stopped() as decoders:
        rollout = cluster.start_rollout(2)
        await cluster.wait_running(8)
        assert not rollout.done()
        for decoder in decoders:
            decoder.kill()
    assert await cluster.finish_rollout(rollout) == {worker.name: 8}
    assert not survivors(decoders)


async def test_worker_kill_during_publish_is_recovered(
    cluster: RolloutCluster,
) -> None:
    with cluster.decoders_stopped():
        rollout = cluster.start_rollout(4)
        victim = await cluster.wait_running(8)
        engines = engine_processes(victim)
        cluster.faults.fault = psutil.Process(victim.pid).kill
        report = await cluster.publish()
    assert (report.updated, list(report.failed)) == ((), [victim.name])
    assert "its worker process has died" in report.failed[victim.name]
    episodes = await cluster.finish_rollout(rollout)
    assert sum(episodes.values()) == 16
    assert victim.name not in episodes
    await cluster.check_replacement(report.version, victim.name)
    assert not survivors(engines)


@pytest.mark.slow
async def test_engine_kill_during_publish_is_recovered(cluster: RolloutCluster) -> None:
    with cluster.decoders_stopped():
        rollout = cluster.start_rollout(4)
        victim = await cluster.wait_running(8)
        actor, (engine, *others) = psutil.Process(victim.pid), engine_processes(victim)
        cluster.faults.fault = engine.kill
        report = await cluster.publish()
    assert (report.updated, list(report.failed)) == ((), [victim.name])
    assert "did not finish" not in report.failed[victim.name]  # detected before the timeout
    assert victim.name not in await cluster.finish_rollout(rollout)
    await cluster.check_replacement(report.version, victim.name)
    assert not survivors([actor, engine, *others])


async def test_drained_node_finishes_its_episodes(
    cluster: RolloutCluster,
) -> None:
    old, version = cluster.worker_nodes[-1], cluster.scheduler.pool.version
    cluster.worker_nodes.append(cluster.nodes.add(**NODE_RESOURCES))
    with cluster.decoders_stopped():
        running = cluster.start_rollout(1)
        leaving = await cluster.wait_running(4)
        engines = engine_processes(leaving)
        cluster.nodes.drain(old, "reclaimed", notice_s=600)
        await cluster.wait_until(lambda: cluster.worker_status(leaving.name).state is WorkerState.DRAINING, 20)
        later = cluster.start_rollout(2)
    assert await cluster.finish_rollout(running) == {leaving.name: 4}
    (other,) = await cluster.finish_rollout(later)
    assert other != leaving.name
    assert await cluster.check_replacement(version, leaving.name) == other
    assert cluster.worker_status(leaving.name).reason == "its node is preempted or drained"
    assert not survivors(engines)
    await cluster.wait_until(lambda: cluster.nodes.is_gone(old), 30)


@pytest.mark.slow
async def test_groups_wait_for_a_node(cluster: RolloutCluster, caplog: pytest.LogCaptureFixture) -> None:
    version = cluster.scheduler.pool.version
    with cluster.decoders_stopped():
        rollout = cluster.start_rollout(4)
        victim = await cluster.wait_running(8)
        engines = engine_processes(victim)
        cluster.nodes.kill(cluster.worker_nodes[-1])
        await cluster.wait_until(lambda: cluster.worker_status(victim.name).state is WorkerState.DEAD, 20)
    assert "its node has died" in cluster.worker_status(victim.name).reason
    await cluster.wait_until(lambda: "8 episodes queued, 2 groups active" in caplog.text, 20)
    assert not survivors(engines)
    assert not rollout.done()
    cluster.worker_nodes.append(cluster.nodes.add(**NODE_RESOURCES))
    assert victim.name not in await cluster.finish_rollout(rollout)
    await cluster.check_replacement(version, victim.name)


async def test_unschedulable_worker_names_missing_resources(
    cluster: RolloutCluster,
) -> None:
    cluster.nodes.add(num_cpus=4, num_gpus=2)
    setup = cluster.setup
    engine = replace(setup.rollout.engine, tensor_parallel_size=4)
    wide = replace(setup, rollout=replace(setup.rollout, engine=engine, start_timeout_s=2))
    worker = RayWorkerClient("wide", wide, gpus=True)
    with pytest.raises(WorkerUnschedulableError) as error:
        await worker.start()
    assert str(error.value) == (
        "wide found no place within 1 s: it needs 1.5 CPU and 4 GPU on one node, and no node has 4 GPU, "
        "the largest node has 4 CPU and 2 GPU: lower rollout.engine.tensor_parallel_size, "
        "or add a larger node"
    )
    await worker.terminate()
    with pytest.raises(WorkerLostError, match="killed by"):
        await worker.check_health()
