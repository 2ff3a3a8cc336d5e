"""Control logic of the rollout scheduler and the worker pool, with fake workers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.rollout import RolloutConfig
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeId, EpisodeStatus, SamplingParams, TokenContext, Trajectory
from vz_ray.rollout.engine_stats import WorkerCapacity
from vz_ray.rollout.rollout_scheduler import RolloutScheduler
from vz_ray.rollout.sample_tracker import SampleTracker
from vz_ray.rollout.worker_handle import WorkerLostError, WorkerState, WorkerUnschedulableError
from vz_ray.rollout.worker_pool import NoWorkersError
from vz_ray.utils.timeouts import StepTimeout
from vz_ray.weight_sync import ParityProbe, WeightPublisher, WeightUpdate

TASKS = [Task(f"t{i}", "v.mp4", "?", "A") for i in range(6)]


class FakeWorkerClient:
    """Worker client with injected failures that records its calls."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.capacity: WorkerCapacity | None = None
        self.pulls_weights = False
        self.version = 0
        self.calls: list[str] = []
        self.episodes: list[tuple[EpisodeId, int]] = []
        self.fail: dict[str, Exception] = {}
        self.unblocked = asyncio.Event()
        self.unblocked.set()
        self.ended = False
        self.drain = ""

    def _record(self, call: str) -> None:
        self.calls.append(call)
        if call in self.fail:
            raise self.fail[call]

    async def start(self) -> None:
        self._record("start")

    async def run_episode(
        self,
        task: Task,
        episode_id: EpisodeId,
        sampling_params: SamplingParams,
        episode_config: EpisodeConfig | None,
    ) -> Trajectory:
        self.calls.append(f"episode {episode_id}")
        await self.unblocked.wait()
        self._record("run_episode")
        self.episodes.append((episode_id, self.version))
        return Trajectory(episode_id, "wire", TokenContext(()), (), EpisodeStatus.ANSWERED, worker=self.name)

    async def pause(self) -> None:
        self._record("pause")

    async def receive_weights(self, update: WeightUpdate) -> None:
        self._record("receive_weights")
        self.version = update.version

    async def resume_engine(self) -> None:
        self._record("resume_engine")

    async def score_probe(self, probe: ParityProbe) -> Sequence[float]:
        raise NotImplementedError

    async def resume(self) -> None:
        self._record("resume")

    async def check_health(self) -> None:
        self._record("check_health")

    async def drain_reason(self) -> str:
        return self.drain

    async def describe_state(self) -> tuple[str, str]:
        self._record("describe_state")
        return "3 episodes running", "thread decode: ..."

    async def worker_stats(self) -> Any:
        raise NotImplementedError

    async def terminate(self) -> None:
        self.ended = True


class FakeTransport:
    async def prepare(self, version: int) -> WeightUpdate:
        return WeightUpdate(version, "", {}, 0)

    async def connect(self, workers: Sequence[Any]) -> None:
        return None

    async def send(self, update: WeightUpdate) -> None:
        return None

    async def abort(self) -> None:
        return None

    async def copy(self, update: WeightUpdate) -> WeightUpdate | None:
        return None


class WorkerFactory:
    """Create fake workers and keep references to them."""

    def __init__(self, script: Callable[[FakeWorkerClient], None] = lambda _: None) -> None:
        self.workers: list[FakeWorkerClient] = []
        self.replaced = asyncio.Event()
        self._script = script

    def spawn(self, name: str) -> FakeWorkerClient:
        worker = FakeWorkerClient(name)
        self._script(worker)
        self.workers.append(worker)
        if name == "rollout-1":
            self.replaced.set()
        return worker


async def start_scheduler(factory: WorkerFactory, **config: Any) -> RolloutScheduler:
    defaults: dict[str, Any] = {
        "num_workers": 2,
        "max_concurrent_episodes": 8,
        "health_check_interval_s": 60.0,
    }
    scheduler = RolloutScheduler(factory.spawn, RolloutConfig(**{**defaults, **config}), WeightPublisher(timeout_s=5))
    await scheduler.start()
    await settle()
    return scheduler


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


async def test_group_runs_on_one_worker() -> None:
    factory, tracker = WorkerFactory(), SampleTracker()
    scheduler = await start_scheduler(factory)
    groups = [group async for group in scheduler.rollout(TASKS, 4, SamplingParams(), tracker)]
    assert {group.task_id for group in groups} == {task.task_id for task in TASKS}
    for group in groups:
        assert [t.id.sample for t in group.trajectories] == [0, 1, 2, 3]
        assert len({t.worker for t in group.trajectories}) == 1
    assert all(worker.episodes for worker in factory.workers)
    assert len(tracker.accepted) == 24
    await scheduler.close()


async def test_slow_group_does_not_block_others() -> None:
    factory = WorkerFactory()
    scheduler = await start_scheduler(factory)
    factory.workers[0].unblocked.clear()
    finished = []
    async for group in scheduler.rollout(TASKS, 4, SamplingParams(), SampleTracker()):
        finished.append(group.task_id)
        if len(finished) == 4:  # the other two groups run on the slow worker
            factory.workers[0].unblocked.set()
    assert len(finished) == 6
    await scheduler.close()


async def test_lost_worker_is_replaced_and_episodes_retried() -> None:
    factory, tracker = WorkerFactory(), SampleTracker()
    scheduler = await start_scheduler(factory)
    factory.workers[0].fail["run_episode"] = WorkerLostError("rollout-0 died")
    groups = [group async for group in scheduler.rollout(TASKS, 4, SamplingParams(), tracker)]
    await settle()
    assert sum(len(group.trajectories) for group in groups) == 24
    assert all(t.status is EpisodeStatus.ANSWERED for group in groups for t in group.trajectories)
    assert all(t.worker != "rollout-0" for group in groups for t in group.trajectories)
    assert factory.workers[0].ended
    assert [(s.name, s.state) for s in scheduler.worker_statuses()] == [
        ("rollout-0", WorkerState.DEAD),
        ("rollout-1", WorkerState.READY),
        ("rollout-2", WorkerState.READY),
    ]
    assert len(tracker.accepted) == 24
    assert max(tracker.accepted.values()) == 1
    await scheduler.close()


async def test_group_moves_together_after_worker_loss() -> None:
    factory = WorkerFactory()
    scheduler = await start_scheduler(factory, num_workers=3)
    factory.workers[0].fail["run_episode"] = WorkerLostError("gone")
    [group] = [g async for g in scheduler.rollout(TASKS[:1], 6, SamplingParams(), SampleTracker())]
    assert len({t.worker for t in group.trajectories}) == 1
    await scheduler.close()


async def test_sample_is_discarded_after_max_attempts() -> None:
    factory, tracker = (
        WorkerFactory(lambda w: w.fail.update(run_episode=StepTimeout("x", "episode", 9))),
        SampleTracker(),
    )
    scheduler = await start_scheduler(factory, max_attempts=3)
    [group] = [g async for g in scheduler.rollout(TASKS[:1], 1, SamplingParams(), tracker)]
    assert group.trajectories[0].status is EpisodeStatus.FAILED
    assert "did not finish episode within 9 s" in group.trajectories[0].error
    assert tracker.discarded == {(0, "t0", 0): group.trajectories[0].error}
    calls = [call for worker in factory.workers for call in worker.calls if call.startswith("episode 0/")]
    assert calls == ["episode 0/t0/0#0", "episode 0/t0/0#1", "episode 0/t0/0#2"]
    assert all(status.state is WorkerState.READY for status in scheduler.worker_statuses())
    await scheduler.close()


async def test_group_starts_on_one_free_slot() -> None:
    factory = WorkerFactory()
    scheduler = await start_scheduler(factory, num_workers=1, max_concurrent_episodes=6)
    factory.workers[0].unblocked.clear()
    task = asyncio.create_task(rollout_all(scheduler, TASKS, 4))
    await settle()
    assert scheduler.worker_statuses()[0].load == 8  # the second group used the two free slots
    factory.workers[0].unblocked.set()
    await task
    assert scheduler.worker_statuses()[0].load == 0
    await scheduler.close()


async def test_closing_the_iterator_releases_all_slots() -> None:
    factory, tracker = WorkerFactory(), SampleTracker()
    scheduler = await start_scheduler(factory)
    factory.workers[1].unblocked.clear()
    groups = scheduler.rollout(TASKS, 4, SamplingParams(), tracker)
    await anext(groups)
    await groups.aclose()
    assert [status.load for status in scheduler.worker_statuses()] == [0, 0]
    assert len(tracker.accepted) + len(tracker.attempts) == 24
    await scheduler.close()


async def test_publish_replaces_failed_worker() -> None:
    factory = WorkerFactory()
    scheduler = await start_scheduler(factory)
    factory.workers[1].fail["receive_weights"] = RuntimeError("half the tensors")
    report = await scheduler.publish(7, FakeTransport())
    await settle()
    assert report.updated == ("rollout-0",)
    assert "half the tensors" in report.failed["rollout-1"]
    assert "resume" not in factory.workers[1].calls
    assert factory.workers[1].ended
    assert factory.workers[2].calls == ["start", "pause", "receive_weights", "resume_engine", "resume"]
    assert factory.workers[2].version == 7
    await scheduler.close()


@pytest.mark.parametrize("wait_for_episodes", [True, False])
async def test_publish_waits_for_episodes_only_if_requested(wait_for_episodes: bool) -> None:
    factory, tracker = WorkerFactory(), SampleTracker()
    scheduler = await start_scheduler(factory, num_workers=1, max_concurrent_episodes=4)
    (worker,) = factory.workers
    worker.unblocked.clear()
    running = asyncio.create_task(scheduler.rollout_group(TASKS[0], 2, SamplingParams(), tracker))
    await settle()
    publishing = asyncio.create_task(scheduler.publish(5, FakeTransport(), wait_for_episodes=wait_for_episodes))
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
    await scheduler.close()


@pytest.mark.parametrize("workers", [1, 2])
async def test_retry_is_allowed_while_publish_waits(workers: int) -> None:
    """With one worker, the retry runs on its replacement, which needs weights while the publish waits."""
    factory, tracker = WorkerFactory(), SampleTracker()
    scheduler = await start_scheduler(factory, num_workers=workers, max_concurrent_episodes=4)
    await scheduler.publish(4, FakeTransport())
    for worker in factory.workers:
        worker.unblocked.clear()
    running = asyncio.create_task(scheduler.rollout_group(TASKS[0], 2, SamplingParams(), tracker))
    await settle()
    publishing = asyncio.create_task(scheduler.publish(5, FakeTransport(), wait_for_episodes=True))
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
    await scheduler.close()


async def test_replacement_gets_current_weights_first() -> None:
    factory = WorkerFactory()
    scheduler = await start_scheduler(factory, num_workers=1)
    await scheduler.publish(3, FakeTransport())
    factory.workers[0].fail["run_episode"] = WorkerLostError("gone")
    groups = await rollout_all(scheduler, TASKS, 2)
    assert len(groups) == 6
    assert {version for _, version in factory.workers[1].episodes} == {3}
    await scheduler.close()


async def test_replacement_failing_weight_load_is_replaced() -> None:
    def script(worker: FakeWorkerClient) -> None:
        if worker.name == "rollout-1":
            worker.fail["receive_weights"] = RuntimeError("no shared memory")

    factory = WorkerFactory(script)
    scheduler = await start_scheduler(factory, num_workers=1)
    await scheduler.publish(3, FakeTransport())
    factory.workers[0].fail["run_episode"] = WorkerLostError("gone")
    await rollout_all(scheduler, TASKS, 2)
    assert [(s.name, s.state.value) for s in scheduler.worker_statuses()] == [
        ("rollout-0", "dead"),
        ("rollout-1", "dead"),
        ("rollout-2", "ready"),
    ]
    assert not factory.workers[1].episodes
    await scheduler.close()


async def test_older_version_is_rejected() -> None:
    scheduler = await start_scheduler(WorkerFactory())
    await scheduler.publish(3, FakeTransport())
    with pytest.raises(ValueError, match="3 is not newer than 3"):
        await scheduler.publish(3, FakeTransport())
    await scheduler.close()


async def test_failed_prepare_leaves_workers_running() -> None:
    class FailingTransport(FakeTransport):
        async def prepare(self, version: int) -> WeightUpdate:
            raise OSError("shared memory is full")

    factory = WorkerFactory()
    scheduler = await start_scheduler(factory)
    with pytest.raises(OSError, match="shared memory is full"):
        await scheduler.publish(1, FailingTransport())
    assert all(worker.calls == ["start"] for worker in factory.workers)
    assert len(await rollout_all(scheduler, TASKS, 2)) == 6
    await scheduler.close()


async def test_start_failure_contains_the_reason() -> None:
    factory = WorkerFactory(lambda w: w.fail.update(start=RuntimeError("no such model")))
    with pytest.raises(NoWorkersError, match="no such model"):
        await start_scheduler(factory, num_workers=1)
    assert len(factory.workers) == 3
    assert all(worker.ended for worker in factory.workers)


async def test_idle_worker_death_is_detected() -> None:
    factory = WorkerFactory()
    scheduler = await start_scheduler(factory, num_workers=1, health_check_interval_s=0.01)
    factory.workers[0].fail["check_health"] = WorkerLostError("its engine is gone")
    await factory.replaced.wait()
    await settle()
    assert [status.state.value for status in scheduler.worker_statuses()] == ["dead", "ready"]
    await scheduler.close()


async def test_close_fails_waiting_groups() -> None:
    factory = WorkerFactory()
    scheduler = await start_scheduler(factory, num_workers=1)
    factory.workers[0].unblocked.clear()
    first = asyncio.create_task(scheduler.rollout_group(TASKS[0], 8, SamplingParams(), SampleTracker()))
    second = asyncio.create_task(scheduler.rollout_group(TASKS[1], 8, SamplingParams(), SampleTracker()))
    await settle()
    await scheduler.close()
    with pytest.raises(NoWorkersError, match="closed"):
        await second
    first.cancel()


async def rollout_all(scheduler: RolloutScheduler, tasks: list[Task], samples: int) -> list[Any]:
    return [group async for group in scheduler.rollout(tasks, samples, SamplingParams(), SampleTracker())]


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("condition not met")


@pytest.fixture
def fast_autoscaling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vz_ray.rollout.worker_pool._AUTOSCALE_INTERVAL_S", 0.01)


def alive(factory: WorkerFactory) -> list[str]:
    return [worker.name for worker in factory.workers if not worker.ended]


@pytest.mark.usefixtures("fast_autoscaling")
async def test_autoscaling_follows_load_without_losses() -> None:
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
    await until(lambda: sum(status.load for status in scheduler.worker_statuses()) == 12)
    assert len(alive(factory)) == 3
    await asyncio.sleep(0.1)
    assert len(alive(factory)) == 3  # the maximum
    for worker in factory.workers:
        worker.unblocked.set()
    groups = await asyncio.gather(*playing)
    assert {t.status for group in groups for t in group.trajectories} == {EpisodeStatus.ANSWERED}
    assert len(tracker.accepted) == 24
    await until(lambda: len(alive(factory)) == 1)
    await scheduler.close()


@pytest.mark.usefixtures("fast_autoscaling")
async def test_scaling_from_zero_uses_current_weights() -> None:
    factory = WorkerFactory()
    scheduler = await start_scheduler(
        factory, num_workers=0, max_workers=2, upscale_delay_s=0.02, downscale_delay_s=0.05
    )
    assert factory.workers == []
    for version in (1, 2):
        await scheduler.publish(version, FakeTransport())
        await rollout_all(scheduler, TASKS, 2)
        await until(lambda: not alive(factory))
        assert {held for worker in factory.workers for _, held in worker.episodes} == set(range(1, version + 1))
    await scheduler.close()


@pytest.mark.usefixtures("fast_autoscaling")
async def test_preempted_worker_drains_and_is_replaced() -> None:
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
    status = scheduler.worker_statuses()[0]
    assert (status.state, status.reason) == (WorkerState.DEAD, "its node is preempted")
    await scheduler.close()


@pytest.mark.usefixtures("fast_autoscaling")
async def test_failed_upscale_keeps_existing_workers() -> None:
    has_capacity = False

    def script(worker: FakeWorkerClient) -> None:
        if worker.name != "rollout-0" and not has_capacity:
            worker.fail["start"] = WorkerLostError("is unschedulable")

    factory = WorkerFactory(script)
    scheduler = await start_scheduler(
        factory,
        num_workers=1,
        max_workers=3,
        max_concurrent_episodes=4,
        upscale_delay_s=0.01,
        health_check_interval_s=0.05,
    )
    factory.workers[0].unblocked.clear()
    playing = asyncio.create_task(rollout_all(scheduler, TASKS, 4))
    await until(lambda: len(factory.workers) > 6)  # several retries
    factory.workers[0].unblocked.set()
    groups = await playing
    assert len(groups) == 6
    assert {t.worker for group in groups for t in group.trajectories} == {"rollout-0"}
    has_capacity = True
    factory.workers[0].fail["check_health"] = WorkerLostError("gone")
    await until(
        lambda: any(s.state is WorkerState.READY and s.name != "rollout-0" for s in scheduler.worker_statuses())
    )
    await scheduler.close()


@pytest.mark.usefixtures("fast_autoscaling")
async def test_scale_from_zero_failure_contains_the_reason() -> None:
    factory = WorkerFactory(lambda worker: worker.fail.update(start=WorkerLostError("is unschedulable")))
    scheduler = await start_scheduler(factory, num_workers=0, max_workers=2, upscale_delay_s=0.01)
    with pytest.raises(NoWorkersError, match="is unschedulable"):
        await scheduler.rollout_group(TASKS[0], 2, SamplingParams(), SampleTracker())
    await scheduler.close()


async def test_unschedulable_workers_are_retried() -> None:
    has_capacity = False

    def script(worker: FakeWorkerClient) -> None:
        if worker.name != "rollout-0" and not has_capacity:
            worker.fail["start"] = WorkerUnschedulableError("is unschedulable")

    factory = WorkerFactory(script)
    scheduler = await start_scheduler(factory, num_workers=2, health_check_interval_s=0.01)
    await until(lambda: len(factory.workers) > 6)
    assert {t.worker for group in await rollout_all(scheduler, TASKS, 2) for t in group.trajectories} == {"rollout-0"}
    factory.workers[0].fail["check_health"] = WorkerLostError("gone")
    await until(lambda: factory.workers[0].ended)
    waiting = asyncio.create_task(rollout_all(scheduler, TASKS, 2))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    has_capacity = True
    assert len(await waiting) == 6
    await until(lambda: scheduler.num_serving_workers == 2)
    await scheduler.close()


async def test_lack_of_workers_warns_then_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vz_ray.rollout.worker_pool._NO_WORKER_WARN_AFTER_S", 0.1)

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
    await scheduler.close()


async def test_start_failures_are_retried_while_others_serve() -> None:
    broken = True

    def script(worker: FakeWorkerClient) -> None:
        if worker.name != "rollout-0" and broken:
            worker.fail["start"] = RuntimeError("no such device")

    factory = WorkerFactory(script)
    scheduler = await start_scheduler(factory, num_workers=2, health_check_interval_s=0.01)
    await until(lambda: len(factory.workers) > 6)
    broken = False
    await until(lambda: scheduler.num_serving_workers == 2)
    await scheduler.close()


async def test_ready_worker_loss_resets_start_failures() -> None:
    broken = True

    def script(worker: FakeWorkerClient) -> None:
        if worker.name != "rollout-0" and broken:
            worker.fail["start"] = RuntimeError("no such device")

    factory = WorkerFactory(script)
    scheduler = await start_scheduler(factory, num_workers=2)
    await until(lambda: len(factory.workers) == 4)
    await settle()
    broken = False
    factory.workers[0].fail["run_episode"] = WorkerLostError("gone")
    assert len(await rollout_all(scheduler, TASKS, 2)) == 6
    await scheduler.close()


async def test_hung_worker_does_not_block_other_health_checks() -> None:
    factory = WorkerFactory()
    scheduler = await start_scheduler(factory, num_workers=2, health_check_interval_s=0.01)
    first, second = factory.workers
    stuck = asyncio.Event()

    async def hang() -> None:
        await stuck.wait()

    first.check_health = hang  # type: ignore[method-assign]
    await asyncio.sleep(0.05)
    second.fail["check_health"] = WorkerLostError("its engine is gone")
    await until(lambda: second.ended)
    await scheduler.close()


async def test_start_timeout_contains_last_loss_reason() -> None:
    factory = WorkerFactory(
        lambda worker: worker.fail.update(start=WorkerUnschedulableError("is unschedulable: it needs 4 GPU"))
    )
    with pytest.raises(StepTimeout, match=r"starting its first worker within 0\.2 s .*it needs 4 GPU"):
        await start_scheduler(factory, num_workers=1, health_check_interval_s=0.01, start_timeout_s=0.2)


async def test_first_samples_are_kept_with_extra_samples() -> None:
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
    assert scheduler.worker_statuses()[0].load == 0
    await scheduler.close()


async def test_extra_samples_replace_failed_ones() -> None:
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
    await scheduler.close()


@pytest.mark.parametrize("answers", [True, False])
async def test_timeout_reports_worker_state(answers: bool, caplog: pytest.LogCaptureFixture) -> None:
    factory, tracker = WorkerFactory(), SampleTracker()
    scheduler = await start_scheduler(factory, num_workers=1, max_attempts=1)
    factory.workers[0].fail["run_episode"] = StepTimeout("rollout-0", "episode 0/t0/0#0", 5)
    if not answers:
        factory.workers[0].fail["describe_state"] = WorkerLostError("gone")
    group = await scheduler.rollout_group(TASKS[0], 1, SamplingParams(), tracker)
    expected = "3 episodes running" if answers else "state unavailable: WorkerLost"
    assert expected in group.trajectories[0].error
    assert ("thread decode" in caplog.text) is answers
    await scheduler.close()


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
