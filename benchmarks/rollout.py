"""Episodes a second: as the fleet plays them, against lockstep rounds, static shards and the floor.

    make bench-rollout
    make bench-rollout ARGS="--workload workloads.json --tasks 64 --repeats 5"

Real vLLM engines in rollout workers, the tiny model, long videos. Episodes follow a script (how many tokens
in each turn, which clips), so that every schedule has the same work; all have the same engines, as many
episodes at a time on each engine, and the same caches. Schedules:

- continuous: the fleet's: groups go to whoever has room, each episode goes on when its clip is there;
- lockstep: each engine has its part of the tasks and plays as many episodes at a time as it has places, in
  rounds: all turns, then all clips, then the next round;
- static: each engine has its part of the tasks; episodes go on one by one, and the batch ends when the
  slowest engine has played its part;
- floor: the fleet's schedule with clips in memory: nobody waits for one.

Two modes: `latency`, where clips take as long as the workload says and cost no CPU, and `decode`, where the
clip pool decodes them; its floor has the same clips decoded beside the episodes, nobody waiting for them.

The last line is one JSON object. Ratios are ours / theirs in episodes a second, medians over the repeats;
those at the top level are of the mode `latency`.
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
GROUP_SIZE, SEQUENCES = 8, 32
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
    """Engines, decoders and tasks of one run of this script."""

    workload: Workload
    tasks: list[Task]
    tape: RecordedClips
    fleet: RolloutScheduler
    workers: list[ScriptedWorkerClient]
    places: int
    runs: int = 0

    async def time_schedule(self, schedule: str, mode: str) -> tuple[float, list[WorkerStats]]:
        """Episodes a second, and what the engines counted before and after."""
        self.runs += 1
        minute = self.runs % (MINUTES - 1)
        waits = "memory" if schedule == "floor" else mode
        await asyncio.gather(*(worker.call("reset", waits, minute) for worker in self.workers))
        before = await self.fleet.worker_stats()
        began = time.monotonic()
        if schedule == "floor" and mode == "decode":
            played, _ = await asyncio.gather(self.continuous(), self.decode(minute))
        else:
            played = await self._of(schedule)()
        seconds = time.monotonic() - began
        assert len(played) == len(self.tasks) * GROUP_SIZE
        assert {one.status for one in played} == {EpisodeStatus.ANSWERED}, {one.error for one in played}
        return len(played) / seconds, [*before, *await self.fleet.worker_stats()]

    def _of(self, schedule: str) -> Callable[[], Awaitable[list[Trajectory]]]:
        return {
            "continuous": self.continuous,
            "floor": self.continuous,
            "static": lambda: self.shards("play_shard"),
            "lockstep": lambda: self.shards("play_rounds", self.places),
        }[schedule]

    async def continuous(self) -> list[Trajectory]:
        groups = self.fleet.rollout(self.tasks, GROUP_SIZE, SAMPLING, SampleTracker(), step=self.runs)
        return [trajectory async for group in groups for trajectory in group.trajectories]

    async def shards(self, method: str, *more: Any) -> list[Trajectory]:
        """Every engine is given its part of the tasks, and all are waited for."""
        asked = []
        for index, worker in enumerate(self.workers):
            games = [
                (task, EpisodeId(self.runs, task.task_id, sample))
                for task in self.tasks[index :: len(self.workers)]
                for sample in range(GROUP_SIZE)
            ]
            asked.append(worker.call(method, games, SAMPLING, *more))
        return [trajectory for part in await asyncio.gather(*asked) for trajectory in part]

    async def decode(self, minute: int) -> None:
        """Every clip of the batch once, as fast as the pool can."""
        asked = [
            self.tape.pool.zoom(uri, shift_zoom(request, minute), frame_size(EPISODE_CONFIG))
            for uri, request in self.tape.clips
            if isinstance(request, ZoomRequest)
        ]
        await asyncio.gather(*asked)


async def record_clips(tasks: Sequence[Task], workload: Workload, pool: DecodePool) -> RecordedClips:
    """All clips that the script asks for, decoded, in memory."""
    size = frame_size(EPISODE_CONFIG)
    wanted: dict[tuple[str, OverviewRequest | ZoomRequest], Awaitable[Clip]] = {}
    overview = OverviewRequest(
        EPISODE_CONFIG.overview_fps, EPISODE_CONFIG.overview_frames, EPISODE_CONFIG.overview_spread
    )
    for uri in {task.video for task in tasks}:
        wanted[uri, overview] = pool.overview(uri, overview, size)
    for number, task in enumerate(tasks):
        for sample in range(GROUP_SIZE):
            for turn, frames in enumerate(workload.shape(number, sample, GROUP_SIZE)["clip_frames"]):
                zoom = scripted_zoom(number, sample, turn, frames)
                if (task.video, zoom) not in wanted:
                    wanted[task.video, zoom] = pool.zoom(task.video, zoom, size)
    clips = dict(zip(wanted, await asyncio.gather(*wanted.values()), strict=True))
    info = {uri: await pool.probe(uri) for uri in {task.video for task in tasks}}
    return RecordedClips(info, clips, workload.clip_ms, pool)


async def measure(asked: argparse.Namespace, logs: Path) -> dict[str, Any]:
    """All schedules in both modes, taking turns, as often as asked for."""
    workload = Workload.load(asked.workload)
    folder = asked.videos
    folder.mkdir(parents=True, exist_ok=True)
    # As many files as there are contents: each is a minute longer than the one before.
    paths = [str(make_video(folder, *SIZE, MINUTES + extra)) for extra in range(NUM_VIDEOS)]
    tasks = [
        Task(str(index), paths[index % NUM_VIDEOS], "What is shown?\nA. This\nB. That", "A")
        for index in range(asked.tasks)
    ]
    pool = DecodePool.start(
        ClipsConfig(num_actors=2, cpus_per_actor=0, disk_cache_gib=0, threads_per_actor=1)
    )
    await pool.wait_until_ready()
    tape = await record_clips(tasks, workload, pool)
    config = RolloutConfig(
        engine=EngineConfig(max_model_len=4096, max_num_seqs=SEQUENCES, kv_cache_gib=1.0, num_threads=1),
        num_workers=asked.engines,
        max_concurrent_episodes=asked.places,
        cpus_per_worker=0,
        health_check_interval_s=3600,
    )
    setup = WorkerSetup(str(MODEL), config, EPISODE_CONFIG, RewardConfig(), tape, score_episode, str(logs))
    workers: list[ScriptedWorkerClient] = []

    def spawn(name: str) -> ScriptedWorkerClient:
        workers.append(ScriptedWorkerClient(name, setup))
        return workers[-1]

    fleet = RolloutScheduler(spawn, config, WeightPublisher(timeout_s=60))
    await fleet.start()
    try:
        while fleet.num_serving_workers < asked.engines:  # noqa: ASYNC110  (the fleet need not announce what only this asks)
            await asyncio.sleep(0.1)
        await asyncio.gather(*(worker.call("learn", workload, GROUP_SIZE) for worker in workers))
        bench = RolloutBenchmark(workload, tasks, tape, fleet, workers, asked.places)
        return await run_schedules(bench, asked.repeats)
    finally:
        await fleet.close()
        pool.close()


async def run_schedules(bench: RolloutBenchmark, repeats: int) -> dict[str, Any]:
    speeds: dict[tuple[str, str], list[float]] = {}
    hits: dict[str, float] = {}
    await bench.time_schedule("floor", "latency")  # warms up
    for lap in range(repeats):
        for mode in MODES:
            for schedule in SCHEDULES:
                speed, stats = await bench.time_schedule(schedule, mode)
                speeds.setdefault((mode, schedule), []).append(speed)
                print(f"{lap + 1}/{repeats} {mode} {schedule}: {speed:.2f} episodes/s", flush=True)
                if (mode, schedule) == ("latency", "continuous"):
                    hits = cache_hit_rates(stats)
    found = {mode: summarize({s: speeds[mode, s] for s in SCHEDULES}) for mode in MODES}
    return {**found["latency"], **hits, "decode": found["decode"], "engines": len(bench.workers)}


def summarize(speeds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and ratios to the medians of the others."""
    median = {schedule: statistics.median(values) for schedule, values in speeds.items()}
    ours = median["continuous"]
    return {
        "episodes_per_s": round(ours, 2),
        "ratio_vs_lockstep": round(ours / median["lockstep"], 2),
        "ratio_vs_static": round(ours / median["static"], 2),
        "ratio_vs_floor": round(ours / median["floor"], 2),
        "all_episodes_per_s": {schedule: round(value, 2) for schedule, value in median.items()},
    }


def cache_hit_rates(stats: Sequence[WorkerStats]) -> dict[str, float]:
    """Shares of a run; the first half of `stats` is from before it."""
    before, after = stats[: len(stats) // 2], stats[len(stats) // 2 :]

    def grown(name: str) -> int:
        return sum(getattr(s.engine, name) for s in after) - sum(getattr(s.engine, name) for s in before)

    return {
        "prefix_cache_hit": round(grown("cached_tokens") / grown("prompt_tokens"), 3),
        "mm_cache_hit": round(grown("cached_frames") / grown("frames"), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", type=Path, default=None, help="JSON file of episodes and latencies")
    parser.add_argument("--tasks", type=int, default=32, help=f"in a batch, of {GROUP_SIZE} samples each")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--places", type=int, default=32, help="episodes at a time on each engine")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--videos", type=Path, default=Path(tempfile.gettempdir()) / "vz_ray_bench", help="kept between runs"
    )
    asked = parser.parse_args()
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
            found = asyncio.run(measure(asked, Path(folder) / "logs"))
        finally:
            ray.shutdown()
    print(
        json.dumps(
            {
                **found,
                "tasks": asked.tasks,
                "samples": GROUP_SIZE,
                "places": asked.places,
                "repeats": asked.repeats,
            }
        )
    )


if __name__ == "__main__":
    main()
