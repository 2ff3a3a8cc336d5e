"""Groups and samples on fake workers: placement, retries, extra samples, timeouts."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from tests.rollout.fake_workers import (
    TASKS,
    StartScheduler,
    WorkerFactory,
    run_groups,
    settle,
    start_groups,
    until,
)
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeId, EpisodeStatus, SamplingParams, Trajectory
from vz_ray.rollout.sample_tracker import SampleTracker
from vz_ray.rollout.worker_handle import WorkerLostError, WorkerState
from vz_ray.utils.timeouts import StepTimeout


async def test_group_runs_on_one_worker(start_scheduler: StartScheduler) -> None:
    factory, tracker = WorkerFactory(), SampleTracker()
    scheduler = await start_scheduler(factory)
    groups = await run_groups(scheduler, TASKS, 4, tracker)
    assert {group.task_id for group in groups} == {task.task_id for task in TASKS}
    for group in groups:
        assert [t.id.sample for t in group.trajectories] == [0, 1, 2, 3]
        assert len({t.worker for t in group.trajectories}) == 1
    assert all(worker.episodes for worker in factory.workers)
    assert len(tracker.accepted) == 24


async def test_slow_group_does_not_block_others(start_scheduler: StartScheduler) -> None:
    factory = WorkerFactory()
    scheduler = await start_scheduler(factory)
    factory.workers[0].unblocked.clear()
    finished = []
    for group in asyncio.as_completed(start_groups(scheduler, TASKS, 4)):
        finished.append((await group).task_id)
        if len(finished) == 4:  # the other two groups run on the slow worker
            factory.workers[0].unblocked.set()
    assert len(finished) == 6


async def test_lost_worker_is_replaced_and_episodes_retried(start_scheduler: StartScheduler) -> None:
    factory, tracker = WorkerFactory(), SampleTracker()
    scheduler = await start_scheduler(factory)
    factory.workers[0].fail["run_episode"] = WorkerLostError("rollout-0 died")
    groups = await run_groups(scheduler, TASKS, 4, tracker)
    await settle()
    assert sum(len(group.trajectories) for group in groups) == 24
    assert all(t.status is EpisodeStatus.ANSWERED for group in groups for t in group.trajectories)
    assert all(t.worker != "rollout-0" for group in groups for t in group.trajectories)
    assert factory.workers[0].ended
    assert [(s.name, s.state) for s in scheduler.pool.worker_statuses()] == [
        ("rollout-0", WorkerState.DEAD),
        ("rollout-1", WorkerState.READY),
        ("rollout-2", WorkerState.READY),
    ]
    assert len(tracker.accepted) == 24
    assert max(tracker.accepted.values()) == 1


async def test_episodes_of_a_lost_worker_continue_after_their_reported_turns(
    start_scheduler: StartScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples 0 and 1 reported turns; that of an episode which has ended is not stored."""
    monkeypatch.setattr("vz_ray.rollout.pool_maintenance._COLLECT_INTERVAL_S", 0.01)
    factory = WorkerFactory(lambda worker: worker.unblocked.clear())
    scheduler = await start_scheduler(factory, num_workers=1)
    [running] = start_groups(scheduler, TASKS[:1], 3)
    await settle()
    first = factory.workers[0]
    ids = [EpisodeId(0, TASKS[0].task_id, sample) for sample in range(3)]
    first.completed_turns = {ids[0]: b"one turn", ids[1]: b"two turns", EpisodeId(0, "ended", 0): b"turns"}
    await until(lambda: not first.completed_turns)
    await settle()
    [worker] = scheduler.pool._workers
    assert worker.completed_turns == {ids[0]: b"one turn", ids[1]: b"two turns", ids[2]: b""}
    first.fail["run_episode"] = WorkerLostError("rollout-0 died")
    first.unblocked.set()
    await until(lambda: len(factory.workers) == 2)
    second = factory.workers[1]
    second.unblocked.set()
    await running
    retried = [replace(id, attempt=1) for id in ids]
    assert second.continued == {retried[0]: b"one turn", retried[1]: b"two turns"}
    assert {id for id, _ in second.episodes} == set(retried)
    assert worker.completed_turns == {}


async def test_group_moves_together_after_worker_loss(start_scheduler: StartScheduler) -> None:
    factory = WorkerFactory()
    scheduler = await start_scheduler(factory, num_workers=3)
    factory.workers[0].fail["run_episode"] = WorkerLostError("gone")
    [group] = await run_groups(scheduler, TASKS[:1], 6)
    assert len({t.worker for t in group.trajectories}) == 1


async def test_sample_is_discarded_after_max_attempts(start_scheduler: StartScheduler) -> None:
    factory, tracker = (
        WorkerFactory(lambda w: w.fail.update(run_episode=StepTimeout("x", "episode", 9))),
        SampleTracker(),
    )
    scheduler = await start_scheduler(factory, max_attempts=3)
    [group] = await run_groups(scheduler, TASKS[:1], 1, tracker)
    assert group.trajectories[0].status is EpisodeStatus.FAILED
    assert "did not finish episode within 9 s" in group.trajectories[0].error
    assert tracker.discarded == {(0, "t0", 0): group.trajectories[0].error}
    calls = [call for worker in factory.workers for call in worker.calls if call.startswith("episode 0/")]
    assert calls == ["episode 0/t0/0#0", "episode 0/t0/0#1", "episode 0/t0/0#2"]
    assert all(status.state is WorkerState.READY for status in scheduler.pool.worker_statuses())


async def test_group_starts_on_one_free_slot(start_scheduler: StartScheduler) -> None:
    factory = WorkerFactory()
    scheduler = await start_scheduler(factory, num_workers=1, max_concurrent_episodes=6)
    factory.workers[0].unblocked.clear()
    task = asyncio.create_task(run_groups(scheduler, TASKS, 4))
    await settle()
    assert scheduler.pool.worker_statuses()[0].load == 8  # the second group used the two free slots
    factory.workers[0].unblocked.set()
    await task
    assert scheduler.pool.worker_statuses()[0].load == 0


async def test_cancelled_groups_release_all_slots(start_scheduler: StartScheduler) -> None:
    factory, tracker = WorkerFactory(), SampleTracker()
    scheduler = await start_scheduler(factory)
    factory.workers[1].unblocked.clear()
    groups = start_groups(scheduler, TASKS, 4, tracker)
    await groups[0]
    for group in groups:
        group.cancel()
    await asyncio.gather(*groups, return_exceptions=True)
    assert [status.load for status in scheduler.pool.worker_statuses()] == [0, 0]
    assert len(tracker.accepted) + len(tracker.attempts) == 24


async def test_first_samples_are_kept_with_extra_samples(start_scheduler: StartScheduler) -> None:
    factory, tracker = WorkerFactory(), SampleTracker()
    scheduler = await start_scheduler(factory, num_workers=1)
    (worker,) = factory.workers
    slow = asyncio.Event()
    original = worker.run_episode

    async def slow_for_some(task: Task, id: EpisodeId, *rest: Any) -> Trajectory:
        if id.sample in (1, 2):
            await slow.wait()
        return await original(task, id, *rest)

    worker.run_episode = slow_for_some  # type: ignore[method-assign]
    group = await scheduler.rollout_group(TASKS[0], 3, SamplingParams(), tracker, extra_samples=2)
    assert [t.id.sample for t in group.trajectories] == [0, 3, 4]
    assert tracker.pending == ()
    assert {key[2]: why for key, why in tracker.discarded.items()} == dict.fromkeys((1, 2), "extra sample, not needed")
    assert scheduler.pool.worker_statuses()[0].load == 0


async def test_extra_samples_replace_failed_ones(start_scheduler: StartScheduler) -> None:
    factory, tracker = WorkerFactory(), SampleTracker()
    scheduler = await start_scheduler(factory, num_workers=1, max_attempts=1)
    (worker,) = factory.workers
    original = worker.run_episode

    async def one_fails(task: Task, id: EpisodeId, *rest: Any) -> Trajectory:
        if id.sample == 0:
            raise StepTimeout("rollout-0", f"episode {id}", 5, "stuck")
        return await original(task, id, *rest)

    worker.run_episode = one_fails  # type: ignore[method-assign]
    group = await scheduler.rollout_group(TASKS[0], 2, SamplingParams(), tracker, extra_samples=1)
    assert [(t.id.sample, t.status) for t in group.trajectories] == [
        (1, EpisodeStatus.ANSWERED),
        (2, EpisodeStatus.ANSWERED),
    ]


@pytest.mark.parametrize("answers", [True, False])
async def test_timeout_reports_worker_state(
    start_scheduler: StartScheduler, answers: bool, caplog: pytest.LogCaptureFixture
) -> None:
    factory, tracker = WorkerFactory(), SampleTracker()
    scheduler = await start_scheduler(factory, num_workers=1, max_attempts=1)
    factory.workers[0].fail["run_episode"] = StepTimeout("rollout-0", "episode 0/t0/0#0", 5)
    if not answers:
        factory.workers[0].fail["describe_state"] = WorkerLostError("gone")
    group = await scheduler.rollout_group(TASKS[0], 1, SamplingParams(), tracker)
    expected = "3 episodes running" if answers else "state unavailable: WorkerLost"
    assert expected in group.trajectories[0].error
    assert ("thread decode" in caplog.text) is answers
