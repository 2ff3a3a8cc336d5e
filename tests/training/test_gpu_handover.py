"""Handover of shared GPUs in the training loop, with fake engines and a fake learner."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.rollout.fake_workers import FakeTransport, StartScheduler, WorkerFactory, open_schedulers
from vz_ray.config import load_config
from vz_ray.config.run import GrpoRunConfig
from vz_ray.data.task_sampler import TaskSampler
from vz_ray.env.task import Task
from vz_ray.env.trajectory import Group, RewardParts
from vz_ray.monitoring.metric_logger import read_metrics
from vz_ray.monitoring.progress import Progress
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.rollout.batch_collector import RolloutBatch
from vz_ray.rollout.rollout_scheduler import RolloutScheduler
from vz_ray.rollout.sample_tracker import SampleTracker
from vz_ray.rollout.worker_handle import WorkerState
from vz_ray.runtime.runtime import Runtime
from vz_ray.training import loop
from vz_ray.training.gpu_handover import GpuHandover
from vz_ray.training.state import TrainingState, list_checkpoints
from vz_ray.utils.interrupt import Interrupt, StepStopped, StopRequested
from vz_ray.utils.timeouts import StepTimeout

TASK = Task("t", "v.mp4", "?", "A")
NUM_GPUS = ["learner.world_size=2", "rollout.num_workers=2"]
ASLEEP, READY = {WorkerState.ASLEEP}, {WorkerState.READY}
STEP = [("load_states", ASLEEP), ("grpo_step", ASLEEP)]


@pytest_asyncio.fixture
async def start_scheduler() -> AsyncIterator[StartScheduler]:
    async with open_schedulers() as start:
        yield start


class FakeLearner:
    """Learner that records its calls with the states of the workers."""

    def __init__(self, scheduler: RolloutScheduler) -> None:
        self._scheduler = scheduler
        self.calls: list[tuple[str, set[WorkerState]]] = []
        self.stop_in_step, self.drops_step = 0, False
        self.stop_error: Exception | None = None
        self._stopped = asyncio.Event()

    def _record(self, call: str) -> None:
        self.calls.append((call, {status.state for status in self._scheduler.pool.worker_statuses()}))

    async def load_states(self) -> None:
        self._record("load_states")

    async def grpo_step(self, groups: Sequence[Group], weight_version: int) -> dict[str, float]:
        self._record("grpo_step")
        if sum(call == "grpo_step" for call, _ in self.calls) == self.stop_in_step:
            os.kill(os.getpid(), signal.SIGTERM)
            await self._stopped.wait()
            if self.drops_step:
                raise StepStopped("dropped")
        return {"loss": 0.5}

    async def request_stop(self) -> None:
        self._record("request_stop")
        self._stopped.set()
        if self.stop_error is not None:
            raise self.stop_error

    async def run_with_health_check(self, work: Any) -> Any:
        return await work

    async def save_checkpoint(self, directory: Path) -> None:
        self._record("save_checkpoint")
        directory.mkdir()


class Run:
    """A run on a fake scheduler and learner whose batches are one rolled out group each."""

    def __init__(
        self, folder: Path, scheduler: RolloutScheduler, monkeypatch: pytest.MonkeyPatch, **settings: int
    ) -> None:
        train = {"colocate": "true", "max_steps": 2, "validate_every": 0, "checkpoint_every": 2} | settings
        self.config = load_config(
            GrpoRunConfig, None, [f"train.{key}={value}" for key, value in train.items()] + NUM_GPUS
        )
        self._monkeypatch = monkeypatch
        self.later_publish: Callable[..., Awaitable[None]] | None = None  # replaces `publish` after the first one
        self.dir, _ = RunDir.create_or_resume(folder / "run", "")
        self.scheduler, self.learner = scheduler, FakeLearner(scheduler)
        self.runtime = Runtime(self.learner, scheduler, FakeTransport())  # type: ignore[arg-type]
        self.handover = GpuHandover(self.config, scheduler.pool)
        self.state = TrainingState(TaskSampler([TASK], 0))
        monkeypatch.setattr(loop, "initialize_state", self._initialize_state)
        monkeypatch.setattr(loop, "collect_step_batch", self._collect)
        monkeypatch.setattr(loop, "episode_records", lambda *_: [])
        monkeypatch.setattr(loop, "step_metrics", lambda *_: {})

    async def _initialize_state(self, *_: object) -> TrainingState:
        self.state.weight_version = self.scheduler.pool.version + 1
        await self.scheduler.pool.publish(self.state.weight_version, self.runtime.transport)
        if self.later_publish is not None:
            self._monkeypatch.setattr(self.scheduler.pool, "publish", self.later_publish)
        return self.state

    async def _collect(self, config: GrpoRunConfig, state: TrainingState, runtime: Runtime, step: int) -> RolloutBatch:
        reward = RewardParts(1.0, 1.0, 1.0, 0.0)
        group = await runtime.scheduler.rollout_group(TASK, 2, loop.SamplingParams(), SampleTracker(), step=step)
        batch_group = replace(group, trajectories=tuple(replace(t, reward=reward) for t in group.trajectories))
        return RolloutBatch([batch_group], [(TASK, batch_group)])

    async def train(self, interrupt: Interrupt) -> None:
        await self.handover.give_to_learner()  # the learner starts
        with Progress() as progress:
            await loop.train(self.config, self.dir, self.runtime, self.handover, progress, interrupt)

    def row_names(self) -> set[str]:
        return {name for row in read_metrics(self.dir.metrics) for name in row}


async def test_learner_works_only_while_engines_sleep(
    tmp_path: Path, start_scheduler: StartScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    factory = WorkerFactory()
    run = Run(tmp_path, await start_scheduler(factory), monkeypatch)
    with Interrupt() as interrupt:
        await run.train(interrupt)
    assert run.learner.calls == [*STEP, *STEP, ("save_checkpoint", READY)]
    assert {"time/sleep_seconds", "weight_sync/wake_seconds"} <= run.row_names()
    assert all(worker.calls.count("sleep") == 3 for worker in factory.workers)


@pytest.mark.parametrize(("drops_step", "saved"), [(True, 1), (False, 2)])
async def test_stop_during_learning_saves_the_last_completed_step(
    tmp_path: Path, start_scheduler: StartScheduler, monkeypatch: pytest.MonkeyPatch, drops_step: bool, saved: int
) -> None:
    """The second step is dropped, or completed without its publish: the engines still sleep."""
    factory = WorkerFactory()
    run = Run(tmp_path, await start_scheduler(factory), monkeypatch, max_steps=4)
    run.learner.stop_in_step, run.learner.drops_step = 2, drops_step
    message = rf"^stopped by SIGTERM; saved the run after {saved} steps?$"
    with Interrupt() as interrupt, pytest.raises(StopRequested, match=message):
        await run.train(interrupt)
    assert run.learner.calls == [*STEP, *STEP, ("request_stop", ASLEEP), ("save_checkpoint", ASLEEP)]
    assert [path.name for path in list_checkpoints(run.dir)] == [f"step-{saved:06d}"]
    assert {worker.version for worker in factory.workers} == {2}
    assert len(read_metrics(run.dir.metrics)) == saved


async def test_step_that_cannot_be_dropped_is_completed_and_saved(
    tmp_path: Path, start_scheduler: StartScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, await start_scheduler(WorkerFactory()), monkeypatch)
    run.learner.stop_in_step = 1
    run.learner.stop_error = StepTimeout("the node of learner-rank-0", "a request to stop", 30.0)
    with Interrupt() as interrupt, pytest.raises(StopRequested, match=r"saved the run after 1 step$"):
        await run.train(interrupt)
    assert [path.name for path in list_checkpoints(run.dir)] == ["step-000001"]


async def test_stop_in_the_first_step_saves_nothing(
    tmp_path: Path, start_scheduler: StartScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, await start_scheduler(WorkerFactory()), monkeypatch)
    run.learner.stop_in_step, run.learner.drops_step = 1, True
    with Interrupt() as interrupt, pytest.raises(StopRequested, match=r"SIGTERM; no step was completed$"):
        await run.train(interrupt)
    assert list_checkpoints(run.dir) == []


@pytest.mark.parametrize("phase", ["publish", "validation"])
async def test_stop_during_publish_or_validation_saves_the_step(
    tmp_path: Path, start_scheduler: StartScheduler, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    run = Run(tmp_path, await start_scheduler(WorkerFactory()), monkeypatch, validate_every=1, max_steps=4)

    async def hang(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(3600)

    if phase == "publish":
        run.later_publish = hang
    else:
        monkeypatch.setattr(loop, "validate", hang)
    with Interrupt() as interrupt, pytest.raises(StopRequested, match=r"saved the run after 1 step$"):
        await run.train(interrupt)
    assert [path.name for path in list_checkpoints(run.dir)] == ["step-000001"]
    assert [row["step"] for row in read_metrics(run.dir.metrics)] == [0]


async def test_handover_does_nothing_without_colocation(start_scheduler: StartScheduler) -> None:
    factory = WorkerFactory()
    scheduler = await start_scheduler(factory)
    await GpuHandover(load_config(GrpoRunConfig, None, []), scheduler.pool).give_to_learner()
    assert all("sleep" not in worker.calls for worker in factory.workers)
