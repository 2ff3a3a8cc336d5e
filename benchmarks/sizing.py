"""How many engines, learner ranks and decoders: iterations of training, simulated.

    make sizing
    make sizing ARGS="--gpus 16 64 --model-b 3.1 --zoom-cpu-s 1.26 --run runs/long"

Simulated is when each episode of an iteration samples, waits for a clip, reads it and goes on, on engines
that share their time among the turns they sample, with decoders in front of which requests queue up.

Measured, on two CPU cores (docs/decode.md): CPU seconds of a zoom and of a cold overview. Recorded, with
`--run`: tokens and zooms of that run's episodes; without, those of the paper (two zooms on average).
Computed: seconds of engines and learner on GPUs, from their arithmetic and memory traffic and shares of the
peak that are assumed (`--decode-share`, `--prefill-mfu`, `--learner-mfu`): change them to what you measure.

For each number of GPUs the last JSON line has the best split, and an iteration with engines and learner in
turns (`sync_s`) and with `max_staleness` 1 (`async_s`).
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
    """A split of GPUs, and what an iteration takes with it."""

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
    world: SimulationConfig, machine: GpuModel, gpus: int, engines: int, *, slack: float = 1.05
) -> ClusterSplit:
    """One split, with the fewest decoders that make rollout at most `slack` times as long as any number."""
    ranks = gpus - engines
    best = simulate_rollout(world, machine, engines, 4096)
    low, high = 1, 1
    while simulate_rollout(world, machine, engines, high).seconds > slack * best.seconds:
        low, high = high, 2 * high
    while high - low > max(1, high // 16):
        middle = (low + high) // 2
        slow = simulate_rollout(world, machine, engines, middle).seconds > slack * best.seconds
        low, high = (middle, high) if slow else (low, middle)
    played = simulate_rollout(world, machine, engines, high)
    return ClusterSplit(
        gpus, engines, ranks, high, played, machine.learn_s(played.tokens, ranks), machine.publish_s
    )


def candidate_splits(gpus: int) -> list[int]:
    """Engines that are tried: eighths of the GPUs."""
    return sorted({min(gpus - 1, max(1, round(gpus * part / 8))) for part in range(1, 8)})


def best_split(plans: Sequence[ClusterSplit], *, in_turns: bool) -> ClusterSplit:
    return min(plans, key=lambda one: one.sync_s if in_turns else one.async_s)


def main() -> None:
    machine, world = GpuModel(), SimulationConfig(paper_episode_shapes())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[16, 64, 512])
    parser.add_argument("--run", type=Path, help="a run whose episodes are played")
    parser.add_argument("--tasks", type=int, default=world.batch_size)
    parser.add_argument("--zoom-cpu-s", type=float, default=world.zoom_cpu_s)
    parser.add_argument("--overview-cpu-s", type=float, default=world.overview_cpu_s)
    parser.add_argument("--model-b", type=float, default=machine.params / 1e9, help="parameters, billions")
    parser.add_argument("--decode-share", type=float, default=machine.decode_share)
    parser.add_argument("--prefill-mfu", type=float, default=machine.prefill_mfu)
    parser.add_argument("--learner-mfu", type=float, default=machine.learner_mfu)
    given = parser.parse_args()
    machine = replace(
        machine,
        params=given.model_b * 1e9,
        decode_share=given.decode_share,
        prefill_mfu=given.prefill_mfu,
        learner_mfu=given.learner_mfu,
    )
    shapes = recorded_episode_shapes(given.run) if given.run else paper_episode_shapes()
    world = SimulationConfig(
        shapes, batch_size=given.tasks, zoom_cpu_s=given.zoom_cpu_s, overview_cpu_s=given.overview_cpu_s
    )
    results = {}
    table = Table(title="an iteration, simulated")
    for heading in (
        "GPUs",
        "mode",
        "engines",
        "ranks",
        "decoders",
        "rollout",
        "learn",
        "iteration",
        "GPU hours",
    ):
        table.add_column(heading, justify="right")
    for gpus in given.gpus:
        plans = [plan_split(world, machine, gpus, engines) for engines in candidate_splits(gpus)]
        for in_turns, mode in ((True, "in turns"), (False, "staleness 1")):
            one = best_split(plans, in_turns=in_turns)
            seconds = one.sync_s if in_turns else one.async_s
            sizes = [str(count) for count in (gpus, mode, one.engines, one.ranks, one.decoders)]
            parts = [f"{part:.0f} s" for part in (one.rollout.seconds, one.learn_s, seconds)]
            table.add_row(*sizes, *parts, f"{gpus * seconds / 3600:.2f}")
            results[f"{gpus} {mode}"] = {
                "engines": one.engines,
                "ranks": one.ranks,
                "decoders": one.decoders,
                "rollout_s": round(one.rollout.seconds, 1),
                "last_tenth_s": round(one.rollout.last_tenth_s, 1),
                "engines_busy": round(one.rollout.busy, 3),
                "clip_wait_s": round(one.rollout.clip_wait_s, 2),
                "learn_s": round(one.learn_s, 1),
                "sync_s": round(one.sync_s, 1),
                "async_s": round(one.async_s, 1),
            }
    Console(width=120).print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
