"""Fake rollout workers, and schedulers on them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.rollout import RolloutConfig
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeId, EpisodeStatus, Group, SamplingParams, TokenContext, Trajectory
from vz_ray.rollout.engine_stats import WorkerCapacity
from vz_ray.rollout.rollout_scheduler import RolloutScheduler
from vz_ray.rollout.sample_tracker import SampleTracker
from vz_ray.weight_sync import ParityProbe, ProbeScore, WeightPublisher, WeightTransport, WeightUpdate

TASKS = [Task(f"t{i}", "v.mp4", "?", "A") for i in range(6)]


class FakeWorkerClient:
    """Worker client with injected failures that records its calls."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.capacity: WorkerCapacity | None = None
        self.pulls_weights, self.learner_rank = False, 0
        self.version = 0
        self.calls: list[str] = []
        self.episodes: list[tuple[EpisodeId, int]] = []
        self.fail: dict[str, Exception] = {}
        self.completed_turns: dict[EpisodeId, bytes] = {}
        self.continued: dict[EpisodeId, bytes] = {}
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
        completed_turns: bytes = b"",
    ) -> Trajectory:
        self.calls.append(f"episode {episode_id}")
        if completed_turns:
            self.continued[episode_id] = completed_turns
        await self.unblocked.wait()
        self._record("run_episode")
        self.episodes.append((episode_id, self.version))
        return Trajectory(episode_id, "wire", TokenContext(()), (), EpisodeStatus.ANSWERED, worker=self.name)

    async def read_completed_turns(self) -> Mapping[EpisodeId, bytes]:
        turns, self.completed_turns = self.completed_turns, {}
        return turns

    async def sleep(self, level: int) -> None:
        self._record("sleep")

    async def pause(self) -> None:
        self._record("pause")

    async def receive_weights(self, update: WeightUpdate) -> None:
        self._record("receive_weights")
        self.version = update.version

    async def init_weight_transfer(self, info: dict[str, Any]) -> None:
        raise NotImplementedError

    async def begin_update(self) -> None:
        raise NotImplementedError

    async def receive_part(self, info: dict[str, Any]) -> None:
        raise NotImplementedError

    async def finish_update(self, version: int) -> None:
        raise NotImplementedError

    async def resume_engine(self) -> None:
        self._record("resume_engine")

    async def continue_probe(self, probe: ParityProbe) -> Sequence[int]:
        raise NotImplementedError

    async def score_probe(self, probe: ParityProbe) -> ProbeScore:
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
        return None

    async def terminate(self) -> None:
        self.ended = True


class FakeTransport(WeightTransport):
    """Transport without weights."""

    async def prepare(self, version: int, probe: ParityProbe | None = None) -> WeightUpdate:
        return WeightUpdate(version, "", {}, 0)


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


StartScheduler = Callable[..., Awaitable[RolloutScheduler]]


@asynccontextmanager
async def open_schedulers() -> AsyncIterator[StartScheduler]:
    """Function that starts a scheduler on a factory's workers; all are closed at the end."""
    started: list[RolloutScheduler] = []

    async def start(factory: WorkerFactory, **config: Any) -> RolloutScheduler:
        settings = {"num_workers": 2, "max_concurrent_episodes": 8, "health_check_interval_s": 60.0, **config}
        scheduler = RolloutScheduler(factory.spawn, RolloutConfig(**settings), WeightPublisher(timeout_s=5))
        started.append(scheduler)
        await scheduler.pool.start()
        await settle()
        return scheduler

    yield start
    for scheduler in started:
        await scheduler.pool.close()


def start_groups(
    scheduler: RolloutScheduler,
    tasks: Sequence[Task],
    group_size: int,
    tracker: SampleTracker | None = None,
    sampling_params: SamplingParams = SamplingParams(),  # noqa: B008 - frozen
    step: int = 0,
) -> list[asyncio.Task[Group]]:
    """Start one group per task."""
    tracker = tracker or SampleTracker()
    return [
        asyncio.create_task(scheduler.rollout_group(task, group_size, sampling_params, tracker, step=step))
        for task in tasks
    ]


async def run_groups(
    scheduler: RolloutScheduler, tasks: Sequence[Task], group_size: int, tracker: SampleTracker | None = None
) -> list[Group]:
    """Run one group per task."""
    return await asyncio.gather(*start_groups(scheduler, tasks, group_size, tracker))


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("condition not met")


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)
