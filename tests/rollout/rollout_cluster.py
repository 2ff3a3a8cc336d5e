"""A fleet on nodes that come and go: real raylets, actors, engines and decoders, and an exact account."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.ray_nodes import RayNodes, start_ray_nodes
from tests.rollout.hf_reference import build_tiny_checkpoint, load_hf_model, perturb
from tests.small_run import survivors
from vz_ray.config.clips import ClipsConfig
from vz_ray.config.data import SynthConfig
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.config.rollout import EngineConfig, RolloutConfig
from vz_ray.decode.pool import DecodePool
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeStatus, Group, SamplingParams
from vz_ray.needle.needle_video import QuestionKind, make_video
from vz_ray.needle.synthesis import encode_video, make_tasks
from vz_ray.rewards import score_episode
from vz_ray.rollout.ray_worker import RayWorkerClient
from vz_ray.rollout.rollout_scheduler import RolloutScheduler
from vz_ray.rollout.rollout_worker import WorkerSetup, WorkerStats
from vz_ray.rollout.sample_tracker import SampleTracker
from vz_ray.rollout.worker_handle import WorkerState, WorkerStatus
from vz_ray.utils.timeouts import with_timeout
from vz_ray.weight_sync import (
    ModuleSource,
    PublishReport,
    ShmTransport,
    WeightPublisher,
    WeightStore,
    WeightUpdate,
)

REPLACEMENT_TIMEOUT_S = 240.0
"""Within this the replacement has completed episodes: its engine starts in 10 to 20 s on two calm cores,
and has taken ten times as long on busy ones."""

NODE_RESOURCES = {"num_cpus": 2}
"""Room for one worker, and for decoders beside it."""

EPISODE = EpisodeConfig(
    prompt="conf/prompt/tiny.yaml",
    max_turn_tokens=24,
    max_context=900,
    overview_frames=8,
    min_pixels=784,
    max_pixels=784,
)


class FaultInjector:
    """Something that happens once, to whoever is next to step into it."""

    def __init__(self) -> None:
        self.fault: Callable[[], None] | None = None

    def trigger(self) -> None:
        spring, self.fault = self.fault, None
        if spring is not None:
            spring()


class FaultyWorkerClient(RayWorkerClient):
    """Steps into a trap when it has been paused for new weights, before it receives them."""

    def __init__(self, name: str, setup: WorkerSetup, trap: FaultInjector) -> None:
        super().__init__(name, setup)
        self._trap = trap

    async def receive_weights(self, update: WeightUpdate) -> None:
        self._trap.trigger()
        await super().receive_weights(update)


@dataclass
class RolloutCluster:
    """A fleet on nodes, and the account of what it plays."""

    nodes: RayNodes
    setup: WorkerSetup
    scheduler: RolloutScheduler
    tasks: list[Task]
    model: Any
    transport: ShmTransport
    trap: FaultInjector
    """Sprung by the next worker that has been paused for new weights."""
    tracker: SampleTracker = field(default_factory=SampleTracker)
    num_steps: int = 0
    worker_nodes: list[Any] = field(default_factory=list)
    """Nodes for workers, in the order in which they were added."""
    rollouts: list[asyncio.Task[list[Group]]] = field(default_factory=list)

    def start_rollout(self, groups: int, samples: int = 4) -> asyncio.Task[list[Group]]:
        """Starts to play `groups` groups of an iteration of their own."""
        self.num_steps += 1
        tasks, iteration = self.tasks[:groups], self.num_steps

        async def play() -> list[Group]:
            sampling = SamplingParams(max_tokens=24, seed=iteration)
            playing = self.scheduler.rollout(tasks, samples, sampling, self.tracker, step=iteration)
            return [group async for group in playing]

        self.rollouts.append(asyncio.create_task(play()))
        return self.rollouts[-1]

    async def finish_rollout(self, play: asyncio.Task[list[Group]], samples: int = 4) -> Counter[str]:
        """Waits for the groups and checks that each owed sample came once; how many each worker played."""
        groups = await with_timeout(
            play, REPLACEMENT_TIMEOUT_S, target="scheduler", operation="the groups that were in flight"
        )
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        assert {t.status for t in trajectories} <= set(EpisodeStatus) - {EpisodeStatus.FAILED}, [
            t.error for t in trajectories
        ]
        iteration = trajectories[0].id.step
        owed = [(iteration, group.task_id, sample) for group in groups for sample in range(samples)]
        assert Counter(t.id.sample_key for t in trajectories) == Counter(owed)
        taken = {key: attempt for key, attempt in self.tracker.accepted.items() if key[0] == iteration}
        assert taken == {t.id.sample_key: t.id.attempt for t in trajectories}
        assert not self.tracker.discarded
        assert not self.tracker.rejected
        self.tracker.close_step(iteration)  # refuses if anything is still owed
        return Counter(t.worker for t in trajectories)

    async def check_replacement(self, version: int, lost: str) -> str:
        """The name of the worker in the place of `lost`, after it played whole episodes with that version."""
        play = self.start_rollout(2)
        groups = await with_timeout(
            play, REPLACEMENT_TIMEOUT_S, target="scheduler", operation=f"groups after {lost} was lost"
        )
        assert {t.weight_versions for group in groups for t in group.trajectories} == {(version,)}
        (name,) = await self.finish_rollout(play)
        assert name != lost
        assert self.worker_status(name).state is WorkerState.READY
        assert self.worker_status(lost).state is WorkerState.DEAD
        return name

    async def publish(self) -> PublishReport:
        version = self.scheduler.version + 1
        perturb(self.model, version)
        return await with_timeout(
            self.scheduler.publish(version, self.transport),
            REPLACEMENT_TIMEOUT_S,
            target="scheduler",
            operation="a publish",
        )

    async def serving_worker(self) -> WorkerStats:
        """The one that serves."""
        await self.wait_until(
            lambda: any(seat.state is WorkerState.READY for seat in self.scheduler.worker_statuses())
        )
        (stats,) = await self.scheduler.worker_stats()
        return stats

    async def wait_all_serving(self) -> None:
        """Waits until there are as many workers as there should be, and no more."""
        await self.wait_until(lambda: self.scheduler.num_serving_workers == self.setup.rollout.num_workers)

    def worker_status(self, name: str) -> WorkerStatus:
        return next(seat for seat in self.scheduler.worker_statuses() if seat.name == name)

    async def wait_running(self, episodes: int) -> WorkerStats:
        """Waits until the worker that serves plays so many episodes."""
        for _ in range(400):
            if (stats := await self.serving_worker()).running_episodes >= episodes:
                return stats
            await asyncio.sleep(0.05)
        raise AssertionError(f"no {episodes} episodes began: {self.scheduler.worker_statuses()}")

    async def wait_until(self, what: Callable[[], bool], seconds: float = REPLACEMENT_TIMEOUT_S) -> None:
        for _ in range(int(seconds / 0.05)):
            if what():
                return
            await asyncio.sleep(0.05)
        raise AssertionError(
            f"it did not come to that within {seconds:g} s: {self.scheduler.worker_statuses()}"
        )

    @contextmanager
    def decoders_stopped(self) -> Iterator[list[psutil.Process]]:
        """Decoders stand still, so that every episode that begins waits for its overview."""
        decoders = self.nodes.actor_processes("DecodeActor")
        assert decoders
        for decoder in decoders:
            decoder.send_signal(signal.SIGSTOP)
        try:
            yield decoders
        finally:
            for decoder in decoders:
                if decoder.is_running():
                    decoder.send_signal(signal.SIGCONT)


def engine_processes(stats: WorkerStats) -> list[psutil.Process]:
    """The processes of a worker's engine; the one that computes, and holds the memory, is the first."""
    found: list[psutil.Process] = psutil.Process(stats.pid).children(recursive=True)
    found.sort(key=lambda process: process.memory_info().rss, reverse=True)
    assert found, stats
    return found


@asynccontextmanager
async def open_rollout_cluster(
    path: Path, engine: EngineConfig, *, workers: int = 1, attempts: int = 3
) -> AsyncIterator[RolloutCluster]:
    """A world of as many nodes as workers, with one version published; nothing of it is left behind."""
    video = make_video(3, 64.0, (QuestionKind.IDENTIFY,))
    encode_video(video, path / "video.mp4", SynthConfig())
    question = make_tasks(video, path / "video.mp4")[0]
    tasks = [replace(question, task_id=f"{question.task_id}-{i}") for i in range(4 * workers)]
    model = build_tiny_checkpoint(path / "model")
    learned = load_hf_model(model)
    config = RolloutConfig(
        engine=replace(engine, max_num_seqs=16),
        num_workers=workers,
        max_concurrent_episodes=8,
        cpus_per_worker=1.5,
        max_attempts=attempts,
        health_check_interval_s=0.5,
    )
    with start_ray_nodes(num_cpus=1) as nodes, pytest.MonkeyPatch.context() as patch:
        patch.setattr("vz_ray.rollout.worker_pool._FIRST_WORD_S", 1.0)
        pool = DecodePool.start(ClipsConfig(num_actors=2, cpus_per_actor=0.1, disk_cache_gib=0))
        setup = WorkerSetup(
            str(model), config, EPISODE, RewardConfig(), pool, score_episode, str(path / "logs")
        )
        trap = FaultInjector()
        fleet = RolloutScheduler(
            lambda name: FaultyWorkerClient(name, setup, trap), config, WeightPublisher(timeout_s=60)
        )
        sender = ShmTransport(WeightStore(path / "weights", bucket_bytes=1 << 20), ModuleSource(learned))
        world = RolloutCluster(nodes, setup, fleet, tasks, learned, sender, trap)
        for _ in range(workers):
            world.worker_nodes.append(nodes.add(**NODE_RESOURCES))
        try:
            await fleet.start()
            await world.publish()
            yield world
            assert world.tracker == SampleTracker()
        finally:
            for play in world.rollouts:
                play.cancel()
            await asyncio.gather(*world.rollouts, return_exceptions=True)
            engines = nodes.actor_children("RolloutWorkerActor")
            await fleet.close()
            assert not survivors(engines)
