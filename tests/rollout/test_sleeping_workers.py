"""Workers that share GPUs with the learner: sleep, wake-up at the next publish, losses and joins in between."""

from __future__ import annotations

import asyncio

import pytest

from tests.rollout.fake_workers import (
    TASKS,
    FakeTransport,
    FakeWorkerClient,
    StartScheduler,
    WorkerFactory,
    run_groups,
    settle,
    start_groups,
    until,
)
from vz_ray.rollout.rollout_scheduler import RolloutScheduler
from vz_ray.rollout.worker_handle import WorkerLostError, WorkerState
from vz_ray.weight_sync import ParityProbe, WeightUpdate

WAKE_UP = ["pause", "receive_weights", "resume_engine", "resume"]


def states(scheduler: RolloutScheduler) -> list[WorkerState]:
    return [status.state for status in scheduler.pool.worker_statuses()]


async def test_engines_sleep_until_the_publish(start_scheduler: StartScheduler) -> None:
    factory = WorkerFactory()
    scheduler = await start_scheduler(factory)
    for version in (1, 2):
        for _ in range(2):
            await scheduler.pool.sleep(2)
        assert states(scheduler) == [WorkerState.ASLEEP] * 2
        assert scheduler.pool.num_serving_workers == 2
        report = await scheduler.pool.publish(version, FakeTransport())
        assert report.updated == ("rollout-0", "rollout-1")
        await run_groups(scheduler, TASKS[:2], 2)
    for worker in factory.workers:
        calls = [call for call in worker.calls if "episode" not in call]
        assert calls == ["start", *["sleep", *WAKE_UP] * 2]
        assert {version for _, version in worker.episodes} == {1, 2}


async def test_groups_wait_while_engines_sleep(start_scheduler: StartScheduler) -> None:
    scheduler = await start_scheduler(WorkerFactory())
    await scheduler.pool.sleep(2)
    [group] = start_groups(scheduler, TASKS[:1], 2)
    await settle()
    assert scheduler.pool.queued_episodes == 2
    await scheduler.pool.publish(1, FakeTransport())
    assert len((await group).trajectories) == 2


async def test_sleep_waits_for_episodes_and_starts(start_scheduler: StartScheduler) -> None:
    may_start = asyncio.Event()

    def script(worker: FakeWorkerClient) -> None:
        if worker.name == "rollout-1":
            worker.start = may_start.wait  # type: ignore[method-assign,assignment]

    factory = WorkerFactory(script)
    scheduler = await start_scheduler(factory)
    first, second = factory.workers
    first.unblocked.clear()
    groups = start_groups(scheduler, TASKS[:1], 2)
    await settle()
    sleep = asyncio.create_task(scheduler.pool.sleep(2))
    await settle()
    first.unblocked.set()
    await asyncio.gather(*groups)
    await settle()
    assert not sleep.done()
    assert "sleep" not in first.calls
    may_start.set()
    await sleep
    assert states(scheduler) == [WorkerState.ASLEEP] * 2
    assert second.calls == ["sleep"]


async def test_worker_lost_in_its_sleep_is_replaced_after_the_publish(start_scheduler: StartScheduler) -> None:
    factory = WorkerFactory()
    scheduler = await start_scheduler(factory, health_check_interval_s=0.01)
    await scheduler.pool.sleep(2)
    await until(lambda: all(worker.calls.count("check_health") > 3 for worker in factory.workers))
    assert states(scheduler) == [WorkerState.ASLEEP] * 2  # healthy engines sleep on

    factory.workers[0].fail["check_health"] = WorkerLostError("killed")
    await until(lambda: len(factory.workers) == 3)
    await settle()
    assert states(scheduler) == [WorkerState.DEAD, WorkerState.ASLEEP, WorkerState.STARTING]
    assert factory.workers[2].calls == []  # the learner uses the GPU

    report = await scheduler.pool.publish(1, FakeTransport())
    assert report.updated == ("rollout-1",)
    await until(lambda: states(scheduler)[2] is WorkerState.READY)
    assert factory.workers[2].calls[:5] == ["start", *WAKE_UP]
    assert factory.workers[2].version == 1


@pytest.mark.parametrize("call", ["sleep", "pause", "receive_weights", "resume_engine"])
async def test_worker_that_fails_between_turns_is_replaced(start_scheduler: StartScheduler, call: str) -> None:
    factory = WorkerFactory()
    scheduler = await start_scheduler(factory)
    factory.workers[0].fail[call] = WorkerLostError("killed")
    await scheduler.pool.sleep(2)
    assert factory.workers[0].ended == (call == "sleep")  # its memory is free before the learner uses the GPU
    report = await scheduler.pool.publish(1, FakeTransport())
    assert report.updated == ("rollout-1",)
    await until(lambda: states(scheduler) == [WorkerState.DEAD, WorkerState.READY, WorkerState.READY])
    assert factory.workers[2].version == 1
    assert len(await run_groups(scheduler, TASKS[:2], 2)) == 2


async def test_sleep_waits_for_the_end_of_lost_workers(start_scheduler: StartScheduler) -> None:
    factory = WorkerFactory()
    scheduler = await start_scheduler(factory, health_check_interval_s=0.01)
    may_end = asyncio.Event()
    factory.workers[0].terminate = may_end.wait  # type: ignore[method-assign,assignment]
    factory.workers[0].fail["check_health"] = WorkerLostError("killed")
    await until(lambda: states(scheduler)[0] is WorkerState.DEAD)
    sleep = asyncio.create_task(scheduler.pool.sleep(2))
    await settle()
    assert not sleep.done()
    may_end.set()
    await asyncio.wait_for(sleep, 10)
    assert WorkerState.READY not in states(scheduler)


async def test_preempted_worker_is_replaced_while_asleep(start_scheduler: StartScheduler) -> None:
    factory = WorkerFactory()
    scheduler = await start_scheduler(factory, health_check_interval_s=0.01)
    await scheduler.pool.sleep(2)
    factory.workers[0].drain = "its node is preempted"
    await until(lambda: len(factory.workers) == 3 and factory.workers[0].ended)
    assert states(scheduler) == [WorkerState.DEAD, WorkerState.ASLEEP, WorkerState.STARTING]
    await scheduler.pool.publish(1, FakeTransport())
    await until(lambda: states(scheduler)[2] is WorkerState.READY)


class FailingTransport(FakeTransport):
    async def prepare(self, version: int, probe: ParityProbe | None = None) -> WeightUpdate:
        raise RuntimeError("learner-rank-0 died")


async def test_engines_sleep_on_after_a_failed_publish(start_scheduler: StartScheduler) -> None:
    """A restarted learner finds the GPUs free and publishes again."""
    factory = WorkerFactory()
    scheduler = await start_scheduler(factory)
    await scheduler.pool.sleep(2)
    with pytest.raises(RuntimeError, match="died"):
        await scheduler.pool.publish(1, FailingTransport())
    await scheduler.pool.sleep(2)
    assert states(scheduler) == [WorkerState.ASLEEP] * 2
    report = await scheduler.pool.publish(2, FakeTransport())
    assert report.updated == ("rollout-0", "rollout-1")


async def test_learner_gets_gpus_without_any_worker(start_scheduler: StartScheduler) -> None:
    factory = WorkerFactory()
    scheduler = await start_scheduler(factory, health_check_interval_s=0.01)
    await scheduler.pool.sleep(2)
    for worker in factory.workers[:2]:
        worker.fail["check_health"] = WorkerLostError("killed")
    await until(lambda: len(factory.workers) == 4)
    await scheduler.pool.sleep(2)
    report = await scheduler.pool.publish(1, FakeTransport())
    assert report.updated == ()
    await until(lambda: states(scheduler)[2:] == [WorkerState.READY] * 2)
    assert {worker.version for worker in factory.workers[2:]} == {1}
