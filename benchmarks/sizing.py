"""Cluster sizing: simulate training steps for splits of GPUs into engines, learner ranks and decoders.

    make sizing
    make sizing ARGS="--gpus 16 64 --model Qwen3-VL-4B --zoom-cpu-s 1.26 --run runs/long"

The simulation covers each episode of a step: sampling, waiting for a clip, prefill. Engines share their time
among the turns they sample; decoders have a queue of requests.

Inputs by source:

- measured on two CPU cores (docs/decode.md): CPU seconds of a zoom and of an uncached overview;
- recorded: tokens and zooms of the episodes of `--run`; by default those of the paper (two zooms on average);
- computed: seconds of engines and learner, from FLOPs, memory traffic and assumed fractions of the peak
  (`--decode-share`, `--prefill-mfu`, `--learner-mfu`). Replace the assumptions by your measurements.

A second table has the step of each shipped RL recipe: simulated rollout, and the planner's times of
learner, publish and switch (`vz-ray plan`). Its first row is the split that preceded these recipes: 8 engines and 8
ranks in turns, with a copy of the weights in shared memory before each publish.

The last line is one JSON object with the best split for each number of GPUs, for a synchronous step
(`sync_seconds`) and for `max_staleness` 1 (`async_seconds`), and the seconds of each recipe.
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
from vz_ray.config import load_config
from vz_ray.config.run import GrpoRunConfig
from vz_ray.families import load_model_shape
from vz_ray.planning.assumptions import Assumptions
from vz_ray.planning.planner import make_plan
from vz_ray.planning.step_time import StepTime, step_time

FORMER_SPLIT = Path("conf/videozoomer-7b-rl-split.yaml")
RECIPES = {
    Path("conf/videozoomer-7b-rl.yaml"): "Qwen2.5-VL-7B",
    Path("conf/videozoomer-7b-rl-split.yaml"): "Qwen2.5-VL-7B",
    Path("conf/videozoomer-7b-rl-8gpu.yaml"): "Qwen2.5-VL-7B",
    Path("conf/videozoomer-7b-rl-1gpu.yaml"): "Qwen2.5-VL-7B",
    Path("conf/qwen3-vl-8b-rl.yaml"): "Qwen3-VL-8B",
    Path("conf/qwen3-vl-30b-a3b-rl.yaml"): "Qwen3-VL-30B-A3B",
    Path("conf/qwen3-vl-4b-rl.yaml"): "Qwen3-VL-4B",
    Path("conf/qwen3.5-4b-rl.yaml"): "Qwen3.5-4B",
}
"""Shipped RL recipes and their models."""


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


def time_recipes() -> list[StepTime]:
    """Return the step of the former split and of each shipped RL recipe, with simulated rollout."""
    assumptions = Assumptions()
    steps = []
    for path, model in ((FORMER_SPLIT, RECIPES[FORMER_SPLIT]), *RECIPES.items()):
        config = load_config(GrpoRunConfig, path, [f"model={model}"])
        step = step_time(config, make_plan(config, assumptions), assumptions)
        simulation = SimulationConfig(
            paper_episode_shapes(),
            batch_size=config.train.batch_size,
            group_size=config.train.group_size,
            max_concurrent_episodes=config.rollout.max_concurrent_episodes,
        )
        gpu = GpuModel.of_gpus(load_model_shape(model), assumptions, num_gpus=1)
        rollout = simulate_rollout(simulation, gpu, step.engines, config.clips.num_actors)
        steps.append(replace(step, rollout_s=rollout.seconds))
    nbytes = 2 * load_model_shape(RECIPES[FORMER_SPLIT]).parameters
    steps[0] = replace(steps[0], publish_s=steps[0].publish_s + nbytes / (assumptions.shm_gbps * 1e9))
    return steps


def recipe_table(steps: Sequence[StepTime]) -> Table:
    table = Table(title="Shipped recipes")
    for heading in ("recipe", "mode", "engines", "ranks", "rollout", "learning", "publish", "switch", "step"):
        table.add_column(heading, justify="left" if heading in ("recipe", "mode") else "right")
    for name, step in zip(("before", *(path.stem for path in RECIPES)), steps, strict=True):
        seconds = (step.rollout_s, step.learner.seconds, step.publish_s, step.switch_s, step.seconds)
        cells = [name, step.mode, str(step.engines), str(step.ranks)]
        table.add_row(*cells, *(f"{value:.0f} s" for value in seconds))
    return table


def main() -> None:
    config = SimulationConfig(paper_episode_shapes())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[16, 64, 512])
    parser.add_argument("--run", type=Path, help="run directory with recorded episodes")
    parser.add_argument("--batch-size", type=int, default=config.batch_size, help="tasks per step")
    parser.add_argument("--zoom-cpu-s", type=float, default=config.zoom_cpu_s)
    parser.add_argument("--overview-cpu-s", type=float, default=config.overview_cpu_s)
    parser.add_argument("--model", default="Qwen2.5-VL-7B", help="checkpoint directory or known name")
    defaults = GpuModel()
    parser.add_argument("--decode-share", type=float, default=defaults.decode_share)
    parser.add_argument("--prefill-mfu", type=float, default=defaults.prefill_mfu)
    parser.add_argument("--learner-mfu", type=float, default=defaults.learner_mfu)
    args = parser.parse_args()
    gpu = replace(
        GpuModel.of_gpus(load_model_shape(args.model), Assumptions(), num_gpus=1),
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
    recipes = time_recipes()
    Console(width=120).print(table, recipe_table(recipes))
    seconds = {path.stem: round(step.seconds, 1) for path, step in zip(RECIPES, recipes[1:], strict=True)}
    print(json.dumps(results | {"recipes": {"before": round(recipes[0].seconds, 1), **seconds}}))


if __name__ == "__main__":
    main()
