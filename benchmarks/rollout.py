"""Rollout benchmark: episodes per second of vz_ray's scheduler against three other schedules.

    make bench-rollout
    make bench-rollout ARGS="--workload workloads.json --tasks 64 --repeats 5"

Real vLLM engines in rollout workers run the tiny model on long videos. Episodes follow a script (tokens per
turn, clips), so that every schedule has the same work, engines, concurrency and caches. Schedules:

- continuous: vz_ray's scheduler. Groups go to a worker with free capacity; each episode continues as soon as
  its clip arrives.
- lockstep: each engine gets a shard of the tasks and runs a full batch of episodes in rounds: all turns, then
  all clips, then the next round.
- static: each engine gets a shard of the tasks; episodes continue independently, and the batch ends with the
  slowest engine.
- floor: continuous with all clips in memory, so that no episode waits for a clip.

Modes: in `latency` clips take the latency of the workload without CPU time; in `decode` the decode pool decodes
them. The floor of `decode` decodes the same clips concurrently, without episodes waiting for them.

The last line is one JSON object. Ratios are continuous / other schedule in episodes per second, medians over
the repeats; top-level ratios belong to the mode `latency`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from benchmarks.scripted_rollout import (
    RecordedClips,
    ScriptedWorkerClient,
    frame_size,
    scripted_zoom,
    shift_zoom,
)
from benchmarks.synthetic_video import make_video
from benchmarks.workload import Workload
from vz_ray.config.clips import ClipsConfig
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.config.rollout import EngineConfig, RolloutConfig
from vz_ray.decode import DecodePool
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeId, EpisodeStatus, SamplingParams, Trajectory
from vz_ray.rewards import score_episode
from vz_ray.rollout.rollout_scheduler import RolloutScheduler
from vz_ray.rollout.rollout_worker import WorkerSetup, WorkerStats
from vz_ray.rollout.sample_tracker import SampleTracker
from vz_ray.video.frame import Clip, OverviewRequest, ZoomRequest
from vz_ray.weight_sync import WeightPublisher

MODEL = Path("assets/tiny-base")
NUM_VIDEOS, MINUTES, SIZE = 4, 20, (640, 360)
GROUP_SIZE, MAX_NUM_SEQS = 8, 32
MODES = ("latency", "decode")
SCHEDULES = ("continuous", "lockstep", "static", "floor")
SAMPLING = SamplingParams(temperature=1.0, max_tokens=4096)
EPISODE_CONFIG = EpisodeConfig(
    prompt="conf/prompt/tiny.yaml",
    max_context=4096,
    max_images=128,
    min_pixels=784,
    max_pixels=784,
)


@dataclass
class RolloutBenchmark:
    """Engines, clips and tasks of one benchmark run."""

    workload: Workload
    tasks: list[Task]
    clips: RecordedClips
    scheduler: RolloutScheduler
    workers: list[ScriptedWorkerClient]
    max_concurrent_episodes: int
    num_runs: int = 0

    async def time_schedule(self, schedule: str, mode: str) -> tuple[float, list[WorkerStats]]:
        """Return episodes per second, and the worker stats before and after the run."""
        self.num_runs += 1
        minute = self.num_runs % (MINUTES - 1)
        clip_mode = "memory" if schedule == "floor" else mode
        await asyncio.gather(*(worker.call("reset", clip_mode, minute) for worker in self.workers))
        stats_before = await self.scheduler.pool.worker_stats()
        started = time.monotonic()
        if schedule == "floor" and mode == "decode":
            trajectories, _ = await asyncio.gather(self.run_continuous(), self.decode_clips(minute))
        else:
            trajectories = await self._runner(schedule)()
        seconds = time.monotonic() - started
        assert len(trajectories) == len(self.tasks) * GROUP_SIZE
        statuses = {trajectory.status for trajectory in trajectories}
        assert statuses == {EpisodeStatus.ANSWERED}, {trajectory.error for trajectory in trajectories}
        return len(trajectories) / seconds, [*stats_before, *await self.scheduler.pool.worker_stats()]

    def _runner(self, schedule: str) -> Callable[[], Awaitable[list[Trajectory]]]:
        return {
            "continuous": self.run_continuous,
            "floor": self.run_continuous,
            "static": lambda: self.run_shards("run_shard"),
            "lockstep": lambda: self.run_shards("run_lockstep", self.max_concurrent_episodes),
        }[schedule]

    async def run_continuous(self) -> list[Trajectory]:
        tracker = SampleTracker()
        groups = await asyncio.gather(
            *(
                self.scheduler.rollout_group(task, GROUP_SIZE, SAMPLING, tracker, step=self.num_runs)
                for task in self.tasks
            )
        )
        return [trajectory for group in groups for trajectory in group.trajectories]

    async def run_shards(self, method: str, *arguments: Any) -> list[Trajectory]:
        """Give every engine a shard of the tasks and wait for all of them."""
        calls = []
        for index, worker in enumerate(self.workers):
            episodes = [
                (task, EpisodeId(self.num_runs, task.task_id, sample))
                for task in self.tasks[index :: len(self.workers)]
                for sample in range(GROUP_SIZE)
            ]
            calls.append(worker.call(method, episodes, SAMPLING, *arguments))
        return [trajectory for shard in await asyncio.gather(*calls) for trajectory in shard]

    async def decode_clips(self, minute: int) -> None:
        """Decode every clip of the batch once with the decode pool."""
        calls = [
            self.clips.pool.clip(uri, shift_zoom(request, minute), frame_size(EPISODE_CONFIG))
            for uri, request in self.clips.clips
            if isinstance(request, ZoomRequest)
        ]
        await asyncio.gather(*calls)


async def record_clips(tasks: Sequence[Task], workload: Workload, pool: DecodePool) -> RecordedClips:
    """Decode all clips of the script into memory."""
    size = frame_size(EPISODE_CONFIG)
    calls: dict[tuple[str, OverviewRequest | ZoomRequest], Awaitable[Clip]] = {}
    overview = OverviewRequest(
        EPISODE_CONFIG.overview_fps, EPISODE_CONFIG.overview_frames, EPISODE_CONFIG.overview_spread
    )
    for uri in {task.video for task in tasks}:
        calls[uri, overview] = pool.clip(uri, overview, size)
    for number, task in enumerate(tasks):
        for sample in range(GROUP_SIZE):
            for turn, frames in enumerate(workload.shape(number, sample, GROUP_SIZE)["clip_frames"]):
                zoom = scripted_zoom(number, sample, turn, frames)
                if (task.video, zoom) not in calls:
                    calls[task.video, zoom] = pool.clip(task.video, zoom, size)
    clips = dict(zip(calls, await asyncio.gather(*calls.values()), strict=True))
    info = {uri: await pool.probe(uri) for uri in {task.video for task in tasks}}
    return RecordedClips(info, clips, workload.clip_ms, pool)


async def measure(args: argparse.Namespace, logs: Path) -> dict[str, Any]:
    """Measure all schedules in both modes, in turns."""
    workload = Workload.load(args.workload)
    args.videos.mkdir(parents=True, exist_ok=True)
    # Videos with different content: each is a minute longer than the previous one.
    paths = [str(make_video(args.videos, *SIZE, MINUTES + extra)) for extra in range(NUM_VIDEOS)]
    tasks = [
        Task(str(index), paths[index % NUM_VIDEOS], "What is shown?\nA. This\nB. That", "A")
        for index in range(args.tasks)
    ]
    pool = DecodePool.start(ClipsConfig(num_actors=2, cpus_per_actor=0, disk_cache_gib=0, threads_per_actor=1))
    await pool.wait_until_ready()
    clips = await record_clips(tasks, workload, pool)
    config = RolloutConfig(
        engine=EngineConfig(max_model_len=4096, max_num_seqs=MAX_NUM_SEQS, kv_cache_gib=1.0, num_threads=1),
        num_workers=args.engines,
        max_concurrent_episodes=args.max_concurrent_episodes,
        cpus_per_worker=0,
        health_check_interval_s=3600,
    )
    setup = WorkerSetup(str(MODEL), config, EPISODE_CONFIG, RewardConfig(), clips, score_episode, str(logs))
    workers: list[ScriptedWorkerClient] = []

    def spawn(name: str) -> ScriptedWorkerClient:
        workers.append(ScriptedWorkerClient(name, setup))
        return workers[-1]

    scheduler = RolloutScheduler(spawn, config, WeightPublisher(timeout_s=60))
    await scheduler.pool.start()
    try:
        while scheduler.pool.num_serving_workers < args.engines:  # noqa: ASYNC110  (no event for this condition)
            await asyncio.sleep(0.1)
        await asyncio.gather(*(worker.call("set_script", workload, GROUP_SIZE) for worker in workers))
        benchmark = RolloutBenchmark(workload, tasks, clips, scheduler, workers, args.max_concurrent_episodes)
        return await run_schedules(benchmark, args.repeats)
    finally:
        await scheduler.pool.close()
        pool.close()


async def run_schedules(benchmark: RolloutBenchmark, repeats: int) -> dict[str, Any]:
    rates: dict[tuple[str, str], list[float]] = {}
    hit_rates: dict[str, float] = {}
    await benchmark.time_schedule("floor", "latency")  # warms up
    for lap in range(repeats):
        for mode in MODES:
            for schedule in SCHEDULES:
                rate, stats = await benchmark.time_schedule(schedule, mode)
                rates.setdefault((mode, schedule), []).append(rate)
                print(f"{lap + 1}/{repeats} {mode} {schedule}: {rate:.2f} episodes/s", flush=True)
                if (mode, schedule) == ("latency", "continuous"):
                    hit_rates = cache_hit_rates(stats)
    results = {mode: summarize({s: rates[mode, s] for s in SCHEDULES}) for mode in MODES}
    return {
        **results["latency"],
        **hit_rates,
        "decode": results["decode"],
        "engines": len(benchmark.workers),
    }


def summarize(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Return medians, and the ratios of `continuous` to the other schedules."""
    medians = {schedule: statistics.median(values) for schedule, values in rates.items()}
    continuous = medians["continuous"]
    return {
        "episodes_per_second": round(continuous, 2),
        "ratio_vs_lockstep": round(continuous / medians["lockstep"], 2),
        "ratio_vs_static": round(continuous / medians["static"], 2),
        "ratio_vs_floor": round(continuous / medians["floor"], 2),
        "episodes_per_second_by_schedule": {schedule: round(value, 2) for schedule, value in medians.items()},
    }


def cache_hit_rates(stats: Sequence[WorkerStats]) -> dict[str, float]:
    """Return the cache hit rates of a run; the first half of `stats` is from before the run."""
    before, after = stats[: len(stats) // 2], stats[len(stats) // 2 :]

    def increase(name: str) -> int:
        return sum(getattr(s.engine, name) for s in after) - sum(getattr(s.engine, name) for s in before)

    return {
        "prefix_cache_hit_rate": round(increase("cached_tokens") / increase("prompt_tokens"), 3),
        "mm_cache_hit_rate": round(increase("cached_frames") / increase("frames"), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", type=Path, default=None, help="JSON file of episodes and latencies")
    parser.add_argument("--tasks", type=int, default=32, help=f"tasks per batch, {GROUP_SIZE} samples each")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--max-concurrent-episodes", type=int, default=32, help="per engine")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--videos",
        type=Path,
        default=Path(tempfile.gettempdir()) / "vz_ray_bench",
        help="folder of the test videos, kept between runs",
    )
    args = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_worker_niceness", "0")
    with tempfile.TemporaryDirectory(prefix="vz_ray_") as folder:
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=False,
            _temp_dir=folder,
            log_to_driver=False,
            object_store_memory=500_000_000,
        )
        try:
            result = asyncio.run(measure(args, Path(folder) / "logs"))
        finally:
            ray.shutdown()
    result |= {
        "batch_size": args.tasks,
        "group_size": GROUP_SIZE,
        "max_concurrent_episodes": args.max_concurrent_episodes,
        "repeats": args.repeats,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
