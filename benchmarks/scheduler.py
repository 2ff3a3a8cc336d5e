"""Scheduler benchmark: overhead of the real driver, sample tracker and scheduler with sleeping workers.

    make bench-scheduler
    make bench-scheduler ARGS="--workers 8 64 --seconds 30"

Only the control plane is real. Workers share Ray actor processes, since hundreds of processes do not fit two
cores. Each worker sleeps for the duration of an episode and returns a trajectory of realistic size. Durations
come from a workload file (`sleep_worker.episode_s`, `episodes`) or a similar random distribution.

- utilization_N: fraction of the episode slots of N workers in use, after ramp-up and until the queue is empty.
- driver_cpu_ms_per_episode: CPU time of this process with all threads, including Ray's; with 64 workers.
- driver_rss_growth_mb: memory growth of the driver after a quarter of the run; with 64 workers.
- async_ratio_vs_max: step time with `max_staleness` 1 over the maximum of rollout and learner time. Below 1 if
  the next batch fills slots that the tail of a rollout leaves idle.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.rollout import RolloutConfig
from vz_ray.data.task_sampler import StepTaskSampler, TaskSampler
from vz_ray.env.task import Task
from vz_ray.env.trajectory import (
    EpisodeId,
    EpisodeStatus,
    SampledAction,
    SamplingParams,
    TokenContext,
    Trajectory,
    Turn,
    VersionSpan,
)
from vz_ray.rollout.batch_collector import RolloutBatch, collect_batch
from vz_ray.rollout.batch_prefetcher import BatchPrefetcher
from vz_ray.rollout.engine_stats import WorkerCapacity
from vz_ray.rollout.rollout_scheduler import RolloutScheduler
from vz_ray.rollout.sample_tracker import SampleTracker
from vz_ray.video.frame import FrameRef, ZoomRequest
from vz_ray.weight_sync import ParityProbe, ProbeScore, WeightPublisher, WeightUpdate
from vz_ray.weight_sync.transport import WeightTransport

PAD_ID, OVERVIEW_FRAMES, WORKERS_PER_PROCESS = 7, 64, 16
GROUP_SIZE, MAX_CONCURRENT_EPISODES = 8, 8


@dataclass(frozen=True)
class SleepWorkload:
    """Seconds and shapes of episodes, and seconds of a learner step."""

    seconds: Sequence[float]
    episodes: Sequence[dict[str, Any]]
    learn_s: float

    @classmethod
    def load(cls, path: Path | None) -> SleepWorkload:
        """Load a workload file; without a file, sample a similar distribution."""
        if path is not None and path.exists():
            content = json.loads(path.read_text())
            sleep = content["sleep_worker"]
            return cls(sleep["episode_s"], content["episodes"], sleep["learn_s"])
        rng = random.Random(0)
        episodes = [
            {
                "turn_tokens": [rng.randint(20, 150) for _ in range(zooms + 1)],
                "clip_frames": [rng.choice([4, 8, 12, 16]) for _ in range(zooms)],
            }
            for zooms in (rng.choice([0, 1, 1, 2, 2, 2, 3, 4]) for _ in range(512))
        ]
        return cls([rng.lognormvariate(1.6, 0.6) for _ in range(512)], episodes, 20.0)


class SleepHost:
    """Process of several sleeping workers."""

    def __init__(self, workload: SleepWorkload) -> None:
        self._workload = workload
        self._slots: dict[str, asyncio.Semaphore] = {}

    async def run(self, worker: str, episode_id: EpisodeId, number: int) -> tuple[Trajectory, float, float]:
        """Sleep for one episode; return its trajectory and its start and end times."""
        workload = self._workload
        async with self._slots.setdefault(worker, asyncio.Semaphore(MAX_CONCURRENT_EPISODES)):
            started = time.time()
            await asyncio.sleep(workload.seconds[number % len(workload.seconds)])
            shape = workload.episodes[number % len(workload.episodes)]
            return make_trajectory(worker, episode_id, shape), started, time.time()


def make_trajectory(worker: str, episode_id: EpisodeId, shape: dict[str, Any]) -> Trajectory:
    """Return a trajectory of realistic size: ids, log-probs, grids and frame refs, no pixels."""
    turns = []
    for turn, tokens in enumerate(shape["turn_tokens"]):
        frames = shape["clip_frames"][turn] if turn < len(shape["clip_frames"]) else 0
        action = SampledAction(
            tuple(range(tokens)), (-0.5,) * tokens, (VersionSpan(0, tokens, 1),), SamplingParams(), "zoom"
        )
        zoom = ZoomRequest(1.0, 9.0, 1.0) if frames else None
        turns.append(Turn(action, "word " * tokens, zoom, make_context(frames) if frames else None))
    prompt = make_context(OVERVIEW_FRAMES)
    return Trajectory(episode_id, "chat", prompt, tuple(turns), EpisodeStatus.ANSWERED, worker=worker)


def make_context(frames: int) -> TokenContext:
    refs = tuple(
        FrameRef("blake3:" + "0" * 64, "/data/video.mp4", 0, k / 2, 448, 224, "bicubic", "pyav", f"{k:064x}")
        for k in range(frames)
    )
    ids = tuple(token for k in range(frames) for token in (1000 + k, 1000, PAD_ID, 1001))
    return TokenContext(ids, ((1, 16, 32),) * frames, refs, PAD_ID, merge_size=2)


@dataclass
class SleepWorker:
    """`WorkerClient` without an engine: its episodes sleep."""

    name: str
    host: Any
    spans: list[tuple[float, float]]
    capacity: WorkerCapacity | None = None
    pulls_weights: bool = False

    async def start(self) -> None:
        await asyncio.sleep(0)

    async def run_episode(
        self,
        task: Task,
        episode_id: EpisodeId,
        sampling_params: SamplingParams,
        episode_config: EpisodeConfig | None,
        completed_turns: bytes = b"",
    ) -> Trajectory:
        number = random.Random(str(episode_id)).randrange(1 << 30)
        trajectory, started, ended = await self.host.run.remote(self.name, episode_id, number)
        self.spans.append((started, ended))
        return trajectory

    async def _do_nothing(self, *_: Any) -> None:
        await asyncio.sleep(0)

    pause = init_weight_transfer = receive_weights = resume_engine = resume = _do_nothing
    check_health = terminate = _do_nothing

    async def drain_reason(self) -> str:
        return ""

    async def read_completed_turns(self) -> Mapping[EpisodeId, bytes]:
        return {}

    async def describe_state(self) -> tuple[str, str]:
        return "", ""

    async def continue_probe(self, probe: object) -> Sequence[int]:
        return ()

    async def score_probe(self, probe: object) -> ProbeScore:
        return ProbeScore(0, ())

    async def worker_stats(self) -> Any:
        return None


class NullTransport(WeightTransport):
    """Publishes versions without weights."""

    async def prepare(self, version: int, probe: ParityProbe | None = None) -> WeightUpdate:
        return WeightUpdate(version, "", {}, 0)


@dataclass
class SchedulerRun:
    """A scheduler with sleeping workers, and the time spans of its episodes."""

    scheduler: RolloutScheduler
    spans: list[tuple[float, float]]
    tracker: SampleTracker = field(default_factory=SampleTracker)

    @classmethod
    async def start(cls, num_workers: int, workload: SleepWorkload) -> SchedulerRun:
        spans: list[tuple[float, float]] = []
        num_hosts = -(-num_workers // WORKERS_PER_PROCESS)
        actor = ray.remote(num_cpus=0)(SleepHost).options(max_concurrency=10_000)
        hosts = [actor.remote(workload) for _ in range(num_hosts)]
        await asyncio.gather(*(host.__ray_ready__.remote() for host in hosts))
        numbers = iter(range(10**9))
        config = RolloutConfig(
            num_workers=num_workers,
            max_concurrent_episodes=MAX_CONCURRENT_EPISODES,
            health_check_interval_s=3600,
        )
        scheduler = RolloutScheduler(
            lambda name: SleepWorker(name, hosts[next(numbers) % num_hosts], spans),
            config,
            WeightPublisher(timeout_s=60),
        )
        await scheduler.pool.start()
        return cls(scheduler, spans)

    async def collect(self, sampler: TaskSampler, step: int, batch_size: int) -> RolloutBatch:
        """Collect a batch; a fifth of the groups is dropped and refilled."""
        return await collect_batch(
            self.scheduler,
            StepTaskSampler(sampler, []),
            self.tracker,
            step=step,
            batch_size=batch_size,
            max_sampled_tasks=2 * batch_size,
            group_size=GROUP_SIZE,
            sampling=SamplingParams(),
            keep=lambda group: random.Random(f"{step}/{group.task_id}").random() < 0.8,
        )


async def measure_utilization(num_workers: int, seconds: float, workload: SleepWorkload) -> dict[str, float]:
    """Keep the workers full for about `seconds` with groups in the queue."""
    run = await SchedulerRun.start(num_workers, workload)
    mean_s = sum(workload.seconds) / len(workload.seconds)
    slots = num_workers * MAX_CONCURRENT_EPISODES
    num_groups = max(4 * num_workers, int(seconds / mean_s * slots / GROUP_SIZE))
    tasks = [Task(f"t{i}", "v.mp4", "?", "A") for i in range(num_groups)]

    async def rollout(task: Task) -> None:
        # Discard the group, as training does after its step.
        await run.scheduler.rollout_group(task, GROUP_SIZE, SamplingParams(), run.tracker)

    cpu_started, rss, started = cpu_seconds(), 0.0, time.time()
    rollouts = [asyncio.create_task(rollout(task)) for task in tasks]
    await asyncio.sleep(0.1)
    while run.scheduler.pool.queued_episodes:
        await asyncio.sleep(0.05)
        if not rss and time.time() > started + seconds / 4:
            rss = rss_mb()
    window_end, rss_growth = time.time(), rss_mb() - rss
    await asyncio.gather(*rollouts)
    num_episodes, ended = len(run.spans), time.time()
    await run.scheduler.pool.close()
    window_start = min(start for start, _ in run.spans) + 1.0
    busy = sum(max(0.0, min(end, window_end) - max(start, window_start)) for start, end in run.spans)
    return {
        "utilization": busy / (slots * (window_end - window_start)),
        "episodes_per_second": num_episodes / (ended - started),
        "driver_cpu_ms_per_episode": (cpu_seconds() - cpu_started) * 1e3 / num_episodes,
        "driver_rss_growth_mb": rss_growth,
        "window_seconds": window_end - window_start,
    }


async def measure_async_steps(num_workers: int, num_steps: int, workload: SleepWorkload) -> dict[str, float]:
    """Run training steps with a sleeping learner, synchronous and with `max_staleness` 1."""
    slots = num_workers * MAX_CONCURRENT_EPISODES
    batch_size = max(1, int(workload.learn_s / 7 * slots / GROUP_SIZE * 0.8))
    tasks = [Task(f"t{i}", "v.mp4", "?", "A") for i in range(4 * batch_size)]
    step_seconds: dict[int, float] = {}
    rollout_seconds: list[float] = []
    for staleness in (0, 1):
        run = await SchedulerRun.start(num_workers, workload)
        sampler = TaskSampler(tasks)

        async def collect(step: int, run: SchedulerRun = run, sampler: TaskSampler = sampler) -> RolloutBatch:
            return await run.collect(sampler, step, batch_size)

        ready: list[float] = []
        async with BatchPrefetcher(collect, staleness, num_steps) as prefetcher:
            for step in range(num_steps):
                requested = time.monotonic()
                await prefetcher.get_batch(step)
                ready.append(time.monotonic())
                if not staleness:
                    rollout_seconds.append(ready[-1] - requested)
                await asyncio.sleep(workload.learn_s)
                await run.scheduler.pool.publish(step + 1, NullTransport())
        # Measured from batch to batch: the first rollout and the last learner step cannot overlap.
        step_seconds[staleness] = (ready[-1] - ready[0]) / (num_steps - 1)
        await run.scheduler.pool.close()
    rollout = sum(rollout_seconds) / len(rollout_seconds)
    return {
        "rollout_seconds": rollout,
        "learner_seconds": workload.learn_s,
        "sync_step_seconds": step_seconds[0],
        "async_step_seconds": step_seconds[1],
        "async_ratio_vs_max": step_seconds[1] / max(rollout, workload.learn_s),
    }


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def rss_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Path, default=None, help="JSON file of durations")
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--seconds", type=float, default=60.0, help="duration of each utilization run")
    parser.add_argument("--steps", type=int, default=5, help="steps of each mode, at least 2")
    args = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    workload = SleepWorkload.load(args.workload)
    folder = tempfile.mkdtemp(prefix="vz_ray_")
    ray.init(address="local", num_cpus=4, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
    results: dict[str, Any] = {}
    try:
        for num_workers in args.workers:
            measured = asyncio.run(measure_utilization(num_workers, args.seconds, workload))
            print(f"{num_workers} workers: {json.dumps(measured)}", flush=True)
            results[f"utilization_{num_workers}"] = round(measured["utilization"], 4)
            if num_workers == 64:
                results["driver_cpu_ms_per_episode"] = round(measured["driver_cpu_ms_per_episode"], 3)
                results["driver_rss_growth_mb"] = round(measured["driver_rss_growth_mb"], 1)
        steps = asyncio.run(measure_async_steps(8, args.steps, workload))
        results |= {name: round(value, 3) for name, value in steps.items()}
    finally:
        ray.shutdown()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
