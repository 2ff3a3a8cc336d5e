"""Test harness: a rollout scheduler on several Ray nodes with real actors, engines and decoders."""

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
import torch

from tests.ray_nodes import RayNodes, start_ray_nodes
from tests.rollout.fake_workers import start_groups
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
"""Timeout for a replacement worker to complete episodes. Its engine starts in 10 to 20 s on two idle cores
and takes up to ten times as long on busy ones."""

NODE_RESOURCES = {"num_cpus": 2, "num_gpus": 0}
"""Resources of a node for one worker and the decoders; with GPUs, a node has one."""

EPISODE = EpisodeConfig(
    prompt="conf/prompt/tiny.yaml",
    max_turn_tokens=24,
    max_context=900,
    overview_frames=8,
    min_pixels=784,
    max_pixels=784,
)


class FaultInjector:
    """Run a fault once, at the next trigger."""

    def __init__(self) -> None:
        self.fault: Callable[[], None] | None = None

    def trigger(self) -> None:
        fault, self.fault = self.fault, None
        if fault is not None:
            fault()


class FaultyWorkerClient(RayWorkerClient):
    """Trigger the fault injector between pause and receive of a publish."""

    def __init__(self, name: str, setup: WorkerSetup, faults: FaultInjector, *, gpus: bool = False) -> None:
        super().__init__(name, setup, gpus=gpus)
        self._faults = faults

    async def receive_weights(self, update: WeightUpdate) -> None:
        self._faults.trigger()
        await super().receive_weights(update)


@dataclass
class RolloutCluster:
    """A scheduler on Ray nodes.

    Attributes:
        faults: Triggered by the next paused worker in a publish.
        worker_nodes: Nodes for workers, in start order.
    """

    nodes: RayNodes
    setup: WorkerSetup
    scheduler: RolloutScheduler
    tasks: list[Task]
    model: Any
    transport: ShmTransport
    faults: FaultInjector
    tracker: SampleTracker = field(default_factory=SampleTracker)
    num_steps: int = 0
    worker_nodes: list[Any] = field(default_factory=list)
    rollouts: list[asyncio.Task[list[Group]]] = field(default_factory=list)

    def start_rollout(self, groups: int, samples: int = 4) -> asyncio.Task[list[Group]]:
        """Start the rollout of `groups` groups as a new step."""
        self.num_steps += 1
        tasks, step = self.tasks[:groups], self.num_steps

        async def rollout() -> list[Group]:
            sampling = SamplingParams(max_tokens=24, seed=step)
            return await asyncio.gather(*start_groups(self.scheduler, tasks, samples, self.tracker, sampling, step))

        self.rollouts.append(asyncio.create_task(rollout()))
        return self.rollouts[-1]

    async def finish_rollout(
        self, rollout: asyncio.Task[list[Group]], samples: int = 4, seconds: float = REPLACEMENT_TIMEOUT_S
    ) -> Counter[str]:
        """Wait for the groups and check that each sample was accepted once. Count episodes per worker."""
        groups = await with_timeout(rollout, seconds, target="scheduler", operation="the groups in flight")
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        assert {t.status for t in trajectories} <= set(EpisodeStatus) - {EpisodeStatus.FAILED}, [
            t.error for t in trajectories
        ]
        step = trajectories[0].id.step
        expected = [(step, group.task_id, sample) for group in groups for sample in range(samples)]
        assert Counter(t.id.sample_key for t in trajectories) == Counter(expected)
        accepted = {key: attempt for key, attempt in self.tracker.accepted.items() if key[0] == step}
        assert accepted == {t.id.sample_key: t.id.attempt for t in trajectories}
        assert not self.tracker.discarded
        assert not self.tracker.rejected
        self.tracker.close_step(step)  # raises if a sample is pending
        return Counter(t.worker for t in trajectories)

    async def check_replacement(self, version: int, lost: str) -> str:
        """Run episodes on the replacement of `lost`, check their weight version and return its name."""
        rollout = self.start_rollout(2)
        groups = await with_timeout(
            rollout, REPLACEMENT_TIMEOUT_S, target="scheduler", operation=f"groups after {lost} was lost"
        )
        assert {t.weight_versions for group in groups for t in group.trajectories} == {(version,)}
        (name,) = await self.finish_rollout(rollout)
        assert name != lost
        assert self.worker_status(name).state is WorkerState.READY
        assert self.worker_status(lost).state is WorkerState.DEAD
        return name

    async def publish(self) -> PublishReport:
        version = self.scheduler.pool.version + 1
        perturb(self.model, version)
        return await with_timeout(
            self.scheduler.pool.publish(version, self.transport),
            REPLACEMENT_TIMEOUT_S,
            target="scheduler",
            operation="a publish",
        )

    async def serving_worker(self) -> WorkerStats:
        """Return the stats of the only READY worker."""
        await self.wait_until(
            lambda: any(status.state is WorkerState.READY for status in self.scheduler.pool.worker_statuses())
        )
        (stats,) = await self.scheduler.pool.worker_stats()
        return stats

    async def wait_all_serving(self, seconds: float = REPLACEMENT_TIMEOUT_S) -> None:
        """Wait until the configured number of workers serves."""
        workers = self.setup.rollout.num_workers
        await self.wait_until(lambda: self.scheduler.pool.num_serving_workers == workers, seconds)

    def worker_status(self, name: str) -> WorkerStatus:
        return next(status for status in self.scheduler.pool.worker_statuses() if status.name == name)

    async def wait_running(self, episodes: int) -> WorkerStats:
        """Wait until the READY worker runs this many episodes."""
        for _ in range(400):
            if (stats := await self.serving_worker()).running_episodes >= episodes:
                return stats
            await asyncio.sleep(0.05)
        raise AssertionError(f"fewer than {episodes} episodes are running: {self.scheduler.pool.worker_statuses()}")

    async def wait_until(self, condition: Callable[[], bool], seconds: float = REPLACEMENT_TIMEOUT_S) -> None:
        for _ in range(int(seconds / 0.05)):
            if condition():
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"condition not met within {seconds:g} s: {self.scheduler.pool.worker_statuses()}")

    @contextmanager
    def decoders_stopped(self) -> Iterator[list[psutil.Process]]:
        """Stop the decoder processes, so that new episodes wait for their overviews."""
        decoders = self.nodes.actor_processes("DecoderActor")
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
    """Return the engine processes of a worker, largest first (the model process)."""
    processes: list[psutil.Process] = psutil.Process(stats.pid).children(recursive=True)
    processes.sort(key=lambda process: process.memory_info().rss, reverse=True)
    assert processes, stats
    return processes


@asynccontextmanager
async def open_rollout_cluster(
    path: Path, engine: EngineConfig, *, workers: int = 1, attempts: int = 3, gpus: bool = False
) -> AsyncIterator[RolloutCluster]:
    """Start one node per worker, with a GPU each if `gpus`, and publish version 1. Check that no process is left."""
    video = make_video(3, 64.0, (QuestionKind.IDENTIFY,))
    encode_video(video, path / "video.mp4", SynthConfig())
    task = make_tasks(video, path / "video.mp4")[0]
    tasks = [replace(task, task_id=f"{task.task_id}-{i}") for i in range(4 * workers)]
    model = build_tiny_checkpoint(path / "model")
    learner_model = load_hf_model(model, getattr(torch, engine.dtype))
    config = RolloutConfig(
        engine=replace(engine, max_num_seqs=16),
        num_workers=workers,
        max_concurrent_episodes=8,
        cpus_per_worker=1.5,
        max_attempts=attempts,
        health_check_interval_s=0.5,
    )
    with start_ray_nodes(num_cpus=1, num_gpus=0) as nodes, pytest.MonkeyPatch.context() as patch:
        patch.setattr("vz_ray.rollout.pool_maintenance._NO_WORKER_WARN_AFTER_S", 1.0)
        pool = DecodePool.start(ClipsConfig(num_actors=2, cpus_per_actor=0.1, disk_cache_gib=0))
        setup = WorkerSetup(str(model), config, EPISODE, RewardConfig(), pool, score_episode, str(path / "logs"))
        faults = FaultInjector()
        scheduler = RolloutScheduler(
            lambda name: FaultyWorkerClient(name, setup, faults, gpus=gpus), config, WeightPublisher(timeout_s=60)
        )
        transport = ShmTransport(WeightStore(path / "weights", bucket_bytes=1 << 20), ModuleSource(learner_model))
        cluster = RolloutCluster(nodes, setup, scheduler, tasks, learner_model, transport, faults)
        for _ in range(workers):
            cluster.worker_nodes.append(nodes.add(**NODE_RESOURCES | {"num_gpus": int(gpus)}))
        try:
            await scheduler.pool.start()
            await cluster.publish()
            yield cluster
            assert cluster.tracker == SampleTracker()
        finally:
            for rollout in cluster.rollouts:
                rollout.cancel()
            await asyncio.gather(*cluster.rollouts, return_exceptions=True)
            engines = nodes.actor_children("RolloutWorkerActor")
            await scheduler.pool.close()
            assert not survivors(engines)
