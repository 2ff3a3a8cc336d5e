"""What scheduling costs: the real driver, ledger and fleet, with workers that sleep instead of computing.

    make bench-scheduler
    make bench-scheduler ARGS="--workers 8 64 --seconds 30"

A simulation of engines, for the control plane alone: each worker lives in a Ray actor process that it shares
with others (hundreds of processes would not fit two cores), sleeps as long as the workload's episodes take,
and returns a trajectory of the size that a real one has. Durations come from a workload file with
`sleep_worker.episode_s` and `episodes`; without one they are drawn from the same kind of distribution.

- utilisation_N: share of the places of N workers that an episode was in, from when they had filled until no
  further group was waiting.
- driver_cpu_ms_per_episode: CPU of this process, all threads, Ray's included; of 64 workers.
- driver_rss_growth_mb: of the driver's memory, from when a quarter of the time had passed; of 64 workers.
- async_ratio_vs_max: seconds of an iteration with `max_staleness` 1, over the longer of rollout and learning,
  each alone; below 1 where the next batch fills the places that the last episodes of a rollout leave empty.

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
from collections.abc import Sequence
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
from vz_ray.rollout.rollout_scheduler import RolloutScheduler
from vz_ray.rollout.sample_tracker import SampleTracker
from vz_ray.video.frame import FrameRef, ZoomRequest
from vz_ray.weight_sync import WeightPublisher, WeightUpdate

PAD, OVERVIEW, WORKERS_PER_PROCESS = 7, 64, 16
GROUP_SIZE, MAX_CONCURRENT_EPISODES = 8, 8


@dataclass(frozen=True)
class SleepWorkload:
    """Seconds, tokens and frames of episodes, and seconds of a learner step."""

    seconds: Sequence[float]
    episodes: Sequence[dict[str, Any]]
    learn_s: float

    @classmethod
    def load(cls, path: Path | None) -> SleepWorkload:
        if path is not None and path.exists():
            content = json.loads(path.read_text())
            sleep = content["sleep_worker"]
            return cls(sleep["episode_s"], content["episodes"], sleep["learn_s"])
        draw = random.Random(0)
        episodes = [
            {
                "turn_tokens": [draw.randint(20, 150) for _ in range(zooms + 1)],
                "clip_frames": [draw.choice([4, 8, 12, 16]) for _ in range(zooms)],
            }
            for zooms in (draw.choice([0, 1, 1, 2, 2, 2, 3, 4]) for _ in range(512))
        ]
        return cls([draw.lognormvariate(1.6, 0.6) for _ in range(512)], episodes, 20.0)


@ray.remote(num_cpus=0)
class SleepHost:
    """Some workers' process."""

    def __init__(self, workload: SleepWorkload) -> None:
        self._workload = workload
        self._places: dict[str, asyncio.Semaphore] = {}

    async def play(self, worker: str, id: EpisodeId, number: int) -> tuple[Trajectory, float, float]:
        load = self._workload
        async with self._places.setdefault(worker, asyncio.Semaphore(MAX_CONCURRENT_EPISODES)):
            began = time.time()
            await asyncio.sleep(load.seconds[number % len(load.seconds)])
            played = make_trajectory(worker, id, load.episodes[number % len(load.episodes)])
            return played, began, time.time()


def make_trajectory(worker: str, id: EpisodeId, shape: dict[str, Any]) -> Trajectory:
    """As large as a real one: ids, log-probs, grids and references, no pixels."""
    turns = []
    for turn, tokens in enumerate(shape["turn_tokens"]):
        frames = shape["clip_frames"][turn] if turn < len(shape["clip_frames"]) else 0
        action = SampledAction(
            tuple(range(tokens)), (-0.5,) * tokens, (VersionSpan(0, tokens, 1),), SamplingParams(), "zoom"
        )
        zoom = ZoomRequest(1.0, 9.0, 1.0) if frames else None
        turns.append(Turn(action, "said " * tokens, zoom, make_context(frames) if frames else None))
    return Trajectory(id, "wire", make_context(OVERVIEW), tuple(turns), EpisodeStatus.ANSWERED, worker=worker)


def make_context(frames: int) -> TokenContext:
    refs = tuple(
        FrameRef("blake3:" + "0" * 64, "/data/video.mp4", 0, k / 2, 448, 224, "bicubic", "pyav", f"{k:064x}")
        for k in range(frames)
    )
    ids = tuple(token for k in range(frames) for token in (1000 + k, 1000, PAD, 1001))
    return TokenContext(ids, ((1, 16, 32),) * frames, refs, PAD)


@dataclass
class SleepWorker:
    """A `WorkerClient` whose engine is a clock."""

    name: str
    host: Any
    spans: list[tuple[float, float]]
    capacity: None = None
    pulls_weights: bool = False

    async def start(self) -> None:
        await asyncio.sleep(0)

    async def run_episode(
        self,
        task: Task,
        episode_id: EpisodeId,
        sampling_params: SamplingParams,
        episode_config: EpisodeConfig | None,
    ) -> Trajectory:
        number = random.Random(str(episode_id)).randrange(1 << 30)
        played, began, ended = await self.host.play.remote(self.name, episode_id, number)
        self.spans.append((began, ended))
        return played

    async def _nothing(self, *_: object) -> None:
        await asyncio.sleep(0)

    pause = init_weight_transfer = receive_weights = resume_engine = resume = check_health = terminate = (
        _nothing
    )

    async def drain_reason(self) -> str:
        return ""

    async def score_probe(self, probe: object) -> Sequence[float]:
        return ()

    async def worker_stats(self) -> Any:
        return None


class NullTransport:
    async def prepare(self, version: int) -> WeightUpdate:
        return WeightUpdate(version, "", {}, 0)

    async def connect(self, workers: Sequence[object]) -> None:
        await asyncio.sleep(0)

    async def send(self, update: WeightUpdate) -> None:
        await asyncio.sleep(0)

    async def abort(self) -> None:
        await asyncio.sleep(0)

    async def copy(self, update: WeightUpdate) -> WeightUpdate | None:
        return None


@dataclass
class SchedulerRun:
    """One fleet of sleepers, and what it did."""

    fleet: RolloutScheduler
    spans: list[tuple[float, float]]
    ledger: SampleTracker = field(default_factory=SampleTracker)

    @classmethod
    async def start(cls, workers: int, workload: SleepWorkload) -> SchedulerRun:
        spans: list[tuple[float, float]] = []
        count = -(-workers // WORKERS_PER_PROCESS)
        hosts = [SleepHost.options(max_concurrency=10_000).remote(workload) for _ in range(count)]
        await asyncio.gather(*(host.__ray_ready__.remote() for host in hosts))
        made = iter(range(10**9))
        config = RolloutConfig(
            num_workers=workers, max_concurrent_episodes=MAX_CONCURRENT_EPISODES, health_check_interval_s=3600
        )
        fleet = RolloutScheduler(
            lambda name: SleepWorker(name, hosts[next(made) % count], spans),
            config,
            WeightPublisher(timeout_s=60),
        )
        await fleet.start()
        return cls(fleet, spans)

    async def collect(self, cursor: TaskSampler, iteration: int, tasks: int) -> RolloutBatch:
        return await collect_batch(
            self.fleet,
            StepTaskSampler(cursor, []),
            self.ledger,
            step=iteration,
            batch_size=tasks,
            max_sampled_tasks=2 * tasks,
            group_size=GROUP_SIZE,
            sampling=SamplingParams(),
            keep=lambda group: random.Random(f"{iteration}/{group.task_id}").random() < 0.8,
        )


async def measure_utilization(workers: int, seconds: float, workload: SleepWorkload) -> dict[str, float]:
    """Keeps the fleet full for about `seconds`; groups wait all the time."""
    run = await SchedulerRun.start(workers, workload)
    mean = sum(workload.seconds) / len(workload.seconds)
    groups = max(4 * workers, int(seconds / mean * workers * MAX_CONCURRENT_EPISODES / GROUP_SIZE))
    tasks = [Task(f"t{i}", "v.mp4", "?", "A") for i in range(groups)]

    async def play(task: Task) -> None:
        # As training does with an iteration's groups: what was played is not kept for ever.
        await run.fleet.rollout_group(task, GROUP_SIZE, SamplingParams(), run.ledger)

    cpu, rss, began = cpu_s(), 0.0, time.time()
    playing = [asyncio.create_task(play(task)) for task in tasks]
    await asyncio.sleep(0.1)
    while run.fleet.queued_episodes:
        await asyncio.sleep(0.05)
        if not rss and time.time() > began + seconds / 4:
            rss = rss_mb()
    until, grown = time.time(), rss_mb() - rss
    await asyncio.gather(*playing)
    played, ended = len(run.spans), time.time()
    await run.fleet.close()
    begin = min(b for b, _ in run.spans) + 1.0
    busy = sum(max(0.0, min(e, until) - max(b, begin)) for b, e in run.spans)
    return {
        "utilisation": busy / (workers * MAX_CONCURRENT_EPISODES * (until - begin)),
        "episodes_per_s": played / (ended - began),
        "driver_cpu_ms_per_episode": (cpu_s() - cpu) * 1e3 / played,
        "driver_rss_growth_mb": grown,
        "window_s": until - begin,
    }


async def measure_async_steps(workers: int, iterations: int, workload: SleepWorkload) -> dict[str, float]:
    """Iterations as training runs them, with a learner that sleeps: alone, and overlapping."""
    size = max(1, int(workload.learn_s / 7 * workers * MAX_CONCURRENT_EPISODES / GROUP_SIZE * 0.8))
    tasks = [Task(f"t{i}", "v.mp4", "?", "A") for i in range(4 * size)]
    times: dict[int, float] = {}
    alone: list[float] = []
    for staleness in (0, 1):
        run = await SchedulerRun.start(workers, workload)
        cursor = TaskSampler(tasks)
        batches = BatchPrefetcher(
            lambda i, run=run, cursor=cursor: run.collect(cursor, i, size), staleness, iterations
        )
        ready: list[float] = []
        async with batches as ahead:
            for iteration in range(iterations):
                since = time.monotonic()
                await ahead.get_batch(iteration)
                ready.append(time.monotonic())
                if not staleness:
                    alone.append(ready[-1] - since)
                await asyncio.sleep(workload.learn_s)
                await run.fleet.publish(iteration + 1, NullTransport())
        # From batch to batch: nothing can overlap with the first rollout, nor with the last learning.
        times[staleness] = (ready[-1] - ready[0]) / (iterations - 1)
        await run.fleet.close()
    rollout = sum(alone) / len(alone)
    longer = max(rollout, workload.learn_s)
    return {
        "rollout_s": rollout,
        "learn_s": workload.learn_s,
        "iteration_s_sync": times[0],
        "iteration_s_async": times[1],
        "async_ratio_vs_max": times[1] / longer,
    }


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def rss_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", type=Path, default=None, help="JSON file of durations")
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long each fleet is kept full")
    parser.add_argument("--iterations", type=int, default=5, help="of each schedule, 2 or more")
    asked = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    workload = SleepWorkload.load(asked.workload)
    folder = tempfile.mkdtemp(prefix="vz_ray_")
    ray.init(address="local", num_cpus=4, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
    found: dict[str, Any] = {}
    try:
        for workers in asked.workers:
            one = asyncio.run(measure_utilization(workers, asked.seconds, workload))
            print(f"{workers} workers: {json.dumps(one)}", flush=True)
            found[f"utilisation_{workers}"] = round(one["utilisation"], 4)
            if workers == 64:
                found["driver_cpu_ms_per_episode"] = round(one["driver_cpu_ms_per_episode"], 3)
                found["driver_rss_growth_mb"] = round(one["driver_rss_growth_mb"], 1)
        schedule = asyncio.run(measure_async_steps(8, asked.iterations, workload))
        found |= {name: round(value, 3) for name, value in schedule.items()}
    finally:
        ray.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
