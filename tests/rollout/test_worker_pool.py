"""Lifecycle and weights of fake workers: publish, replacement, autoscaling, preemption, lack of workers."""

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
    until,
)
from vz_ray.config.rollout import RolloutConfig
from vz_ray.env.trajectory import EpisodeStatus, SamplingParams
from vz_ray.rollout.sample_tracker import SampleTracker
from vz_ray.rollout.worker_handle import WorkerLostError, WorkerState, WorkerUnschedulableError
from vz_ray.rollout.worker_wait import NoWorkersError, NoWorkerTimeout
from vz_ray.utils.timeouts import StepTimeout
from vz_ray.weight_sync import ParityProbe, WeightUpdate


class StartFailure:
    """Worker script: while `active`, all workers but `rollout-0` fail to start."""

    def __init__(self, error: Exception) -> None:
        self.error, self.active = error, True

    def __call__(self, worker: FakeWorkerClient) -> None:
        if self.active and worker.name != "rollout-0":
            worker.fail["start"] = self.error


async def test_publish_replaces_failed_worker(start_scheduler: StartScheduler) -> None:
    factory = WorkerFactory()
    scheduler = await start_scheduler(factory)
    factory.workers[1].fail["receive_weights"] = RuntimeError("half the tensors")
    report = await scheduler.pool.publish(7, FakeTransport())
    await settle()
    assert report.updated == ("rollout-0",)
    assert "half the tensors" in report.failed["rollout-1"]
    assert "resume" not in factory.workers[1].calls
    assert factory.workers[1].ended
    assert factory.workers[2].calls == ["start", "pause", "receive_weights", "resume_engine", "resume"]
    assert factory.workers[2].version == 7


@pytest.mark.parametrize("wait_for_episodes", [True, False])
async def test_publish_waits_for_episodes_only_if_requested(
    start_scheduler: StartScheduler, wait_for_episodes: bool
) -> None:
    factory, tracker = WorkerFactory(), SampleTracker()
    scheduler = await start_scheduler(factory, num_workers=1, max_concurrent_episodes=4)
    (worker,) = factory.workers
    worker.unblocked.clear()
    running = asyncio.create_task(scheduler.rollout_group(TASKS[0], 2, SamplingParams(), tracker))
    await settle()
    publishing = asyncio.create_task(scheduler.pool.publish(5, FakeTransport(), wait_for_episodes=wait_for_episodes))
    await settle()
    waiting = asyncio.create_task(scheduler.rollout_group(TASKS[1], 2, SamplingParams(), tracker))
    await settle()
    assert publishing.done() is not wait_for_episodes
    assert worker.calls.count("episode 0/t1/0#0") == (0 if wait_for_episodes else 1)
    worker.unblocked.set()
    await asyncio.gather(running, publishing, waiting)
    first = 0 if wait_for_episodes else 5
    assert [version for id, version in sorted(worker.episodes, key=lambda entry: entry[0].sample_key)] == [
        first,
        first,
        5,
        5,
    ]


@pytest.mark.parametrize("workers", [1, 2])
async def test_retry_is_allowed_while_publish_waits(start_scheduler: StartScheduler, workers: int) -> None:
    """With one worker, the retry runs on its replacement, which needs weights while the publish waits."""
    factory, tracker = WorkerFactory(), SampleTracker()
    scheduler = await start_scheduler(factory, num_workers=workers, max_concurrent_episodes=4)
    await scheduler.pool.publish(4, FakeTransport())
    for worker in factory.workers:
        worker.unblocked.clear()
    running = asyncio.create_task(scheduler.rollout_group(TASKS[0], 2, SamplingParams(), tracker))
    await settle()
    publishing = asyncio.create_task(scheduler.pool.publish(5, FakeTransport(), wait_for_episodes=True))
    await settle()
    worker_with_group = next(worker for worker in factory.workers if any("episode" in call for call in worker.calls))
    worker_with_group.fail["run_episode"] = WorkerLostError("gone")
    for worker in factory.workers:
        worker.unblocked.set()
    group = await asyncio.wait_for(running, 10)
    assert [t.status for t in group.trajectories] == [EpisodeStatus.ANSWERED] * 2
    assert {version for worker in factory.workers for _, version in worker.episodes} == {4}
    assert (await publishing).version == 5
    await settle()
    assert {worker.version for worker in factory.workers if not worker.ended} == {5}


async def test_replacement_gets_current_weights_first(start_scheduler: StartScheduler) -> None:
    factory = WorkerFactory()
    scheduler = await start_scheduler(factory, num_workers=1)
    await scheduler.pool.publish(3, FakeTransport())
    factory.workers[0].fail["run_episode"] = WorkerLostError("gone")
    groups = await run_groups(scheduler, TASKS, 2)
    assert len(groups) == 6
    assert {version for _, version in factory.workers[1].episodes} == {3}


async def test_replacement_failing_weight_load_is_replaced(start_scheduler: StartScheduler) -> None:
    def script(worker: FakeWorkerClient) -> None:
        if worker.name == "rollout-1":
            worker.fail["receive_weights"] = RuntimeError("no shared memory")

    factory = WorkerFactory(script)
    scheduler = await start_scheduler(factory, num_workers=1)
    await scheduler.pool.publish(3, FakeTransport())
    factory.workers[0].fail["run_episode"] = WorkerLostError("gone")
    await run_groups(scheduler, TASKS, 2)
    assert [(s.name, s.state.value) for s in scheduler.pool.worker_statuses()] == [
        ("rollout-0", "dead"),
        ("rollout-1", "dead"),
        ("rollout-2", "ready"),
    ]
    assert not factory.workers[1].episodes


async def test_older_version_is_rejected(start_scheduler: StartScheduler) -> None:
    scheduler = await start_scheduler(WorkerFactory())
    await scheduler.pool.publish(3, FakeTransport())
    with pytest.raises(ValueError, match="3 is not newer than 3"):
        await scheduler.pool.publish(3, FakeTransport())


async def test_failed_prepare_leaves_workers_running(start_scheduler: StartScheduler) -> None:
    class FailingTransport(FakeTransport):
        async def prepare(self, version: int, probe: ParityProbe | None = None) -> WeightUpdate:
            raise OSError("shared memory is full")

    factory = WorkerFactory()
    scheduler = await start_scheduler(factory)
    with pytest.raises(OSError, match="shared memory is full"):
        await scheduler.pool.publish(1, FailingTransport())
    assert all(worker.calls == ["start"] for worker in factory.workers)
    assert len(await run_groups(scheduler, TASKS, 2)) == 6


async def test_start_failure_contains_the_reason(start_scheduler: StartScheduler) -> None:
    factory = WorkerFactory(lambda w: w.fail.update(start=RuntimeError("no such model")))
    with pytest.raises(NoWorkersError, match="no such model"):
        await start_scheduler(factory, num_workers=1)
    assert len(factory.workers) == 3
    assert all(worker.ended for worker in factory.workers)


async def test_idle_worker_death_is_detected(start_scheduler: StartScheduler) -> None:
    factory = WorkerFactory()
    scheduler = await start_scheduler(factory, num_workers=1, health_check_interval_s=0.01)
    factory.workers[0].fail["check_health"] = WorkerLostError("its engine is gone")
    await factory.replaced.wait()
    await settle()
    assert [status.state.value for status in scheduler.pool.worker_statuses()] == ["dead", "ready"]


async def test_close_fails_waiting_groups(start_scheduler: StartScheduler) -> None:
    factory = WorkerFactory()
    scheduler = await start_scheduler(factory, num_workers=1)
    factory.workers[0].unblocked.clear()
    first = asyncio.create_task(scheduler.rollout_group(TASKS[0], 8, SamplingParams(), SampleTracker()))
    second = asyncio.create_task(scheduler.rollout_group(TASKS[1], 8, SamplingParams(), SampleTracker()))
    await settle()
    await scheduler.pool.close()
    with pytest.raises(NoWorkersError, match="closed"):
        await second
    first.cancel()


@pytest.fixture
def fast_autoscaling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vz_ray.rollout.pool_maintenance._SCALE_INTERVAL_S", 0.01)


def alive(factory: WorkerFactory) -> list[str]:
    return [worker.name for worker in factory.workers if not worker.ended]


@pytest.mark.usefixtures("fast_autoscaling")
async def test_autoscaling_follows_load_without_losses(start_scheduler: StartScheduler) -> None:
    factory = WorkerFactory(lambda worker: worker.unblocked.clear())
    scheduler = await start_scheduler(
        factory,
        num_workers=1,
        max_workers=3,
        max_concurrent_episodes=4,
        upscale_delay_s=0.05,
        downscale_delay_s=0.05,
        max_attempts=1,
    )
    tracker = SampleTracker()
    playing = [asyncio.create_task(scheduler.rollout_group(task, 4, SamplingParams(), tracker)) for task in TASKS]
    await until(lambda: sum(status.load for status in scheduler.pool.worker_statuses()) == 12)
    assert len(alive(factory)) == 3
    await asyncio.sleep(0.1)
    assert len(alive(factory)) == 3  # the maximum
    for worker in factory.workers:
        worker.unblocked.set()
    groups = await asyncio.gather(*playing)
    assert {t.status for group in groups for t in group.trajectories} == {EpisodeStatus.ANSWERED}
    assert len(tracker.accepted) == 24
    await until(lambda: len(alive(factory)) == 1)


@pytest.mark.usefixtures("fast_autoscaling")
async def test_workers_stay_during_a_learner_step(start_scheduler: StartScheduler) -> None:
    """Without episodes the policy would stop two of three workers within a tenth of a second."""
    factory = WorkerFactory()
    scheduler = await start_scheduler(
        factory, num_workers=1, max_workers=3, max_concurrent_episodes=4, upscale_delay_s=0.0, downscale_delay_s=0.05
    )
    for worker in factory.workers:
        worker.unblocked.clear()
    groups = [
        asyncio.create_task(scheduler.rollout_group(task, 4, SamplingParams(), SampleTracker())) for task in TASKS
    ]
    with scheduler.pool.keep_workers():
        await until(lambda: len(alive(factory)) == 3)
        factory.workers[0].unblocked.set()
        await asyncio.gather(*groups)
        await asyncio.sleep(0.5)
        assert len(alive(factory)) == 3
    await until(lambda: len(alive(factory)) == 1)


@pytest.mark.usefixtures("fast_autoscaling")
async def test_scaling_from_zero_uses_current_weights(start_scheduler: StartScheduler) -> None:
    factory = WorkerFactory()
    scheduler = await start_scheduler(
        factory, num_workers=0, max_workers=2, upscale_delay_s=0.02, downscale_delay_s=0.05
    )
    assert factory.workers == []
    for version in (1, 2):
        await scheduler.pool.publish(version, FakeTransport())
        await run_groups(scheduler, TASKS, 2)
        await until(lambda: not alive(factory))
        assert {held for worker in factory.workers for _, held in worker.episodes} == set(range(1, version + 1))


@pytest.mark.usefixtures("fast_autoscaling")
async def test_preempted_worker_drains_and_is_replaced(start_scheduler: StartScheduler) -> None:
    factory, tracker = WorkerFactory(), SampleTracker()
    scheduler = await start_scheduler(factory, num_workers=1, health_check_interval_s=0.02)
    (first,) = factory.workers
    first.unblocked.clear()
    running = asyncio.create_task(scheduler.rollout_group(TASKS[0], 2, SamplingParams(), tracker))
    await settle()
    first.drain = "its node is preempted"
    await until(lambda: len(factory.workers) == 2)
    await scheduler.rollout_group(TASKS[1], 2, SamplingParams(), tracker)
    assert first.episodes == []
    assert not first.ended
    first.unblocked.set()
    assert {t.worker for t in (await running).trajectories} == {"rollout-0"}
    await until(lambda: first.ended)
    status = scheduler.pool.worker_statuses()[0]
    assert (status.state, status.reason) == (WorkerState.DEAD, "its node is preempted")


@pytest.mark.usefixtures("fast_autoscaling")
async def test_failed_upscale_keeps_existing_workers(start_scheduler: StartScheduler) -> None:
    failure = StartFailure(WorkerLostError("is unschedulable"))
    factory = WorkerFactory(failure)
    scheduler = await start_scheduler(
        factory,
        num_workers=1,
        max_workers=3,
        max_concurrent_episodes=4,
        upscale_delay_s=0.01,
        health_check_interval_s=0.05,
    )
    factory.workers[0].unblocked.clear()
    playing = asyncio.create_task(run_groups(scheduler, TASKS, 4))
    await until(lambda: len(factory.workers) > 6)  # several retries
    factory.workers[0].unblocked.set()
    groups = await playing
    assert len(groups) == 6
    assert {t.worker for group in groups for t in group.trajectories} == {"rollout-0"}
    failure.active = False
    factory.workers[0].fail["check_health"] = WorkerLostError("gone")
    await until(
        lambda: any(s.state is WorkerState.READY and s.name != "rollout-0" for s in scheduler.pool.worker_statuses())
    )


@pytest.mark.usefixtures("fast_autoscaling")
async def test_scale_from_zero_failure_contains_the_reason(start_scheduler: StartScheduler) -> None:
    factory = WorkerFactory(lambda worker: worker.fail.update(start=WorkerLostError("is unschedulable")))
    scheduler = await start_scheduler(factory, num_workers=0, max_workers=2, upscale_delay_s=0.01)
    with pytest.raises(NoWorkersError, match="is unschedulable"):
        await scheduler.rollout_group(TASKS[0], 2, SamplingParams(), SampleTracker())


async def test_unschedulable_workers_are_retried(start_scheduler: StartScheduler) -> None:
    failure = StartFailure(WorkerUnschedulableError("is unschedulable"))
    factory = WorkerFactory(failure)
    scheduler = await start_scheduler(factory, num_workers=2, health_check_interval_s=0.01)
    await until(lambda: len(factory.workers) > 6)
    assert {t.worker for group in await run_groups(scheduler, TASKS, 2) for t in group.trajectories} == {"rollout-0"}
    factory.workers[0].fail["check_health"] = WorkerLostError("gone")
    await until(lambda: factory.workers[0].ended)
    waiting = asyncio.create_task(run_groups(scheduler, TASKS, 2))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    failure.active = False
    assert len(await waiting) == 6
    await until(lambda: scheduler.pool.num_serving_workers == 2)


async def test_lack_of_workers_warns_then_fails(
    start_scheduler: StartScheduler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vz_ray.rollout.pool_maintenance._NO_WORKER_WARN_AFTER_S", 0.1)

    def script(worker: FakeWorkerClient) -> None:
        if worker.name != "rollout-0":
            worker.fail["start"] = WorkerUnschedulableError(f"{worker.name} is unschedulable: it needs 4 GPU")

    factory = WorkerFactory(script)
    scheduler = await start_scheduler(factory, num_workers=1, health_check_interval_s=0.01, no_worker_timeout_s=0.5)
    factory.workers[0].fail["check_health"] = WorkerLostError("gone")
    await until(lambda: factory.workers[0].ended)
    with pytest.raises(NoWorkersError, match=r"timeouts\.no_workers_s is 0\.5.*it needs 4 GPU"):
        await scheduler.rollout_group(TASKS[0], 3, SamplingParams(), SampleTracker())
    assert "No rollout worker for 0 s: 3 episodes queued, 0 groups active" in caplog.text


async def test_start_failures_are_retried_while_others_serve(start_scheduler: StartScheduler) -> None:
    failure = StartFailure(RuntimeError("no such device"))
    factory = WorkerFactory(failure)
    scheduler = await start_scheduler(factory, num_workers=2, health_check_interval_s=0.01)
    await until(lambda: len(factory.workers) > 6)
    failure.active = False
    await until(lambda: scheduler.pool.num_serving_workers == 2)


async def test_ready_worker_loss_resets_start_failures(start_scheduler: StartScheduler) -> None:
    failure = StartFailure(RuntimeError("no such device"))
    factory = WorkerFactory(failure)
    scheduler = await start_scheduler(factory, num_workers=2)
    await until(lambda: len(factory.workers) == 4)
    await settle()
    failure.active = False
    factory.workers[0].fail["run_episode"] = WorkerLostError("gone")
    assert len(await run_groups(scheduler, TASKS, 2)) == 6


async def test_hung_worker_does_not_block_other_health_checks(start_scheduler: StartScheduler) -> None:
    factory = WorkerFactory()
    await start_scheduler(factory, num_workers=2, health_check_interval_s=0.01)
    first, second = factory.workers
    stuck = asyncio.Event()

    async def hang() -> None:
        await stuck.wait()

    first.check_health = hang  # type: ignore[method-assign]
    await asyncio.sleep(0.05)
    second.fail["check_health"] = WorkerLostError("its engine is gone")
    await until(lambda: second.ended)


async def test_start_timeout_contains_last_loss_reason(start_scheduler: StartScheduler) -> None:
    factory = WorkerFactory(
        lambda worker: worker.fail.update(start=WorkerUnschedulableError("is unschedulable: it needs 4 GPU"))
    )
    with pytest.raises(StepTimeout, match=r"starting its first worker within 0\.2 s .*it needs 4 GPU"):
        await start_scheduler(factory, num_workers=1, health_check_interval_s=0.01, start_timeout_s=0.2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_workers": 3, "max_workers": 2}, r"max_workers is 2; it must be at least num_workers \(3\)"),
        ({"num_workers": 0}, "must be at least 1, or at least 0 with max_workers"),
    ],
)
def test_invalid_worker_bounds_are_rejected(config: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**config)


def test_warnings_repeat_within_each_absence() -> None:
    timer, warned = NoWorkerTimeout(warn_after_s=10, warn_every_s=60), []
    for now in range(0, 200, 5):
        absent = now < 100 or now >= 150
        timer.elapsed_s(now, absent)
        if timer.should_warn(now):
            warned.append(now)
    assert warned == [10, 70, 160]


def test_elapsed_time_restarts_with_each_absence() -> None:
    timer = NoWorkerTimeout(warn_after_s=10, warn_every_s=60)
    assert [timer.elapsed_s(now, True) for now in (100, 101, 107)] == [0, 1, 7]
    assert timer.elapsed_s(108, False) == 0
    assert timer.elapsed_s(120, True) == 0
