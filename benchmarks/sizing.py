"""Cluster sizing: simulate training steps for splits of GPUs into engines, learner ranks and decoders.

    make sizing
    make sizing ARGS="--gpus 16 64 --model-b 3.1 --zoom-cpu-s 1.26 --run runs/long"

The simulation covers each episode of a step: sampling, waiting for a clip, prefill. Engines share their time
among the turns they sample; decoders have a queue of requests.

Inputs by source:

- measured on two CPU cores (docs/decode.md): CPU seconds of a zoom and of an uncached overview;
- recorded: tokens and zooms of the episodes of `--run`; by default those of the paper (two zooms on average);
- computed: seconds of engines and learner, from FLOPs, memory traffic and assumed fractions of the peak
  (`--decode-share`, `--prefill-mfu`, `--learner-mfu`). Replace the assumptions by your measurements.

The last line is one JSON object with the best split for each number of GPUs, for a synchronous step
(`sync_seconds`) and for `max_staleness` 1 (`async_seconds`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.cluster_simulation import (
    GpuModel,
    RolloutTimes,
    SimulationConfig,
    paper_episode_shapes,
    recorded_episode_shapes,
    simulate_rollout,
)


@dataclass(frozen=True, slots=True)
class ClusterSplit:
    """A split of GPUs and its simulated step."""

    gpus: int
    engines: int
    ranks: int
    decoders: int
    rollout: RolloutTimes
    learn_s: float
    publish_s: float

    @property
    def sync_s(self) -> float:
        return self.rollout.seconds + self.learn_s + self.publish_s

    @property
    def async_s(self) -> float:
        return max(self.rollout.seconds, self.learn_s) + self.publish_s


def plan_split(
    config: SimulationConfig, gpu: GpuModel, gpus: int, engines: int, *, slack: float = 1.05
) -> ClusterSplit:
    """Return a split with the fewest decoders whose rollout takes at most `slack` times the minimum."""
    ranks = gpus - engines
    best = simulate_rollout(config, gpu, engines, 4096)
    low, high = 1, 1
    while simulate_rollout(config, gpu, engines, high).seconds > slack * best.seconds:
        low, high = high, 2 * high
    while high - low > max(1, high // 16):
        middle = (low + high) // 2
        too_slow = simulate_rollout(config, gpu, engines, middle).seconds > slack * best.seconds
        low, high = (middle, high) if too_slow else (low, middle)
    rollout = simulate_rollout(config, gpu, engines, high)
    learn_s = gpu.learn_s(rollout.tokens, ranks)
    return ClusterSplit(gpus, engines, ranks, high, rollout, learn_s, gpu.publish_s)


def candidate_splits(gpus: int) -> list[int]:
    """Return the candidate numbers of engines: eighths of the GPUs."""
    return sorted({min(gpus - 1, max(1, round(gpus * eighths / 8))) for eighths in range(1, 8)})


def best_split(splits: Sequence[ClusterSplit], *, synchronous: bool) -> ClusterSplit:
    return min(splits, key=lambda split: split.sync_s if synchronous else split.async_s)


def main() -> None:
    gpu, config = GpuModel(), SimulationConfig(paper_episode_shapes())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[16, 64, 512])
    parser.add_argument("--run", type=Path, help="run directory with recorded episodes")
    parser.add_argument("--batch-size", type=int, default=config.batch_size, help="tasks per step")
    parser.add_argument("--zoom-cpu-s", type=float, default=config.zoom_cpu_s)
    parser.add_argument("--overview-cpu-s", type=float, default=config.overview_cpu_s)
    parser.add_argument("--model-b", type=float, default=gpu.params / 1e9, help="parameters in billions")
    parser.add_argument("--decode-share", type=float, default=gpu.decode_share)
    parser.add_argument("--prefill-mfu", type=float, default=gpu.prefill_mfu)
    parser.add_argument("--learner-mfu", type=float, default=gpu.learner_mfu)
    args = parser.parse_args()
    gpu = replace(
        gpu,
        params=args.model_b * 1e9,
        decode_share=args.decode_share,
        prefill_mfu=args.prefill_mfu,
        learner_mfu=args.learner_mfu,
    )
    config = SimulationConfig(
        recorded_episode_shapes(args.run) if args.run else paper_episode_shapes(),
        batch_size=args.batch_size,
        zoom_cpu_s=args.zoom_cpu_s,
        overview_cpu_s=args.overview_cpu_s,
    )
    results = {}
    table = Table(title="Simulated step")
    headings = ("GPUs", "mode", "engines", "ranks", "decoders", "rollout", "learn", "step", "GPU hours")
    for heading in headings:
        table.add_column(heading, justify="right")
    for gpus in args.gpus:
        splits = [plan_split(config, gpu, gpus, engines) for engines in candidate_splits(gpus)]
        for synchronous, mode in ((True, "synchronous"), (False, "staleness 1")):
            split = best_split(splits, synchronous=synchronous)
            seconds = split.sync_s if synchronous else split.async_s
            counts = [str(value) for value in (gpus, mode, split.engines, split.ranks, split.decoders)]
            times = [f"{value:.0f} s" for value in (split.rollout.seconds, split.learn_s, seconds)]
            table.add_row(*counts, *times, f"{gpus * seconds / 3600:.2f}")
            results[f"{gpus} {mode}"] = {
                "engines": split.engines,
                "ranks": split.ranks,
                "decoders": split.decoders,
                "rollout_seconds": round(split.rollout.seconds, 1),
                "last_tenth_seconds": round(split.rollout.last_tenth_s, 1),
                "engines_busy": round(split.rollout.busy, 3),
                "clip_wait_seconds": round(split.rollout.clip_wait_s, 2),
                "learner_seconds": round(split.learn_s, 1),
                "sync_seconds": round(split.sync_s, 1),
                "async_seconds": round(split.async_s, 1),
            }
    Console(width=120).print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
