"""Stages of an ablation: order, files and remaining time.

    runs/<name>/seed0/cold_start/   exemplars -> reflect -> reflections
                      full/          rl -> evaluate     from `reflections`
                      without_rl/          evaluate     of   `reflections`
                      without_tool_reward/ rl -> ...    from `reflections`
                      without_reflection/  rl -> ...    from `exemplars`
                      without_cold_start/  rl -> ...    from the base

A stage is done if its output exists; outputs are written atomically. To resume, plan again and skip the
stages that are done. This module only reads the file system.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from statistics import fmean

from vz_ray.config.ablation import (
    VARIANTS,
    WITHOUT_COLD_START,
    WITHOUT_REFLECTION,
    WITHOUT_RL,
    WITHOUT_TOOL_REWARD,
    variant_title,
)
from vz_ray.eval.eval_log import count_answered
from vz_ray.eval.run_summary import COLD_START, RL, eval_log_path
from vz_ray.monitoring.run_dir import stage_seconds


class StageKind(StrEnum):
    """Kind of a stage, also the name of its recorded time."""

    EXEMPLARS = "exemplars"
    """Train the base model on exemplars only."""
    REFLECT = "reflect"
    """Run that policy and correct its wrong zooms."""
    REFLECTIONS = "reflections"
    """Train the base model on exemplars and reflections for the same number of steps."""
    RL = "rl"
    EVALUATE = "evaluate"


DEFAULT_STAGE_SECONDS = {
    StageKind.EXEMPLARS: 75.0,
    StageKind.REFLECT: 40.0,
    StageKind.REFLECTIONS: 100.0,
    StageKind.RL: 400.0,
    StageKind.EVALUATE: 130.0,
}
"""Default durations, measured at the quickstart's size on two cores."""


@dataclass(frozen=True, slots=True)
class AblationStage:
    """One stage of an ablation.

    Attributes:
        seed: Seed of the run.
        variant: Variant of the stage; `cold_start` if variants share the output.
        kind: Kind of the stage.
    """

    seed: int
    variant: str
    kind: StageKind

    def __str__(self) -> str:
        return f"seed {self.seed}, {variant_title(self.variant)}: {self.kind}"


def plan_stages(seeds: Sequence[int], variants: Sequence[str]) -> list[AblationStage]:
    """Return all stages in an order that restarts the engines at most once per seed."""
    stages: list[AblationStage] = []
    for index, seed in enumerate(seeds):
        stages += [
            AblationStage(seed, COLD_START, kind)
            for kind in (StageKind.EXEMPLARS, StageKind.REFLECT, StageKind.REFLECTIONS)
        ]
        if WITHOUT_RL in variants:
            stages.append(AblationStage(seed, WITHOUT_RL, StageKind.EVALUATE))
        trained = [variant for variant in VARIANTS if variant in variants and variant != WITHOUT_RL]
        # Engines without the tool reward are reused for the next seed.
        trained.sort(key=lambda variant: (variant == WITHOUT_TOOL_REWARD) != bool(index % 2))
        for variant in trained:
            stages += [AblationStage(seed, variant, kind) for kind in (StageKind.RL, StageKind.EVALUATE)]
    return stages


@dataclass(frozen=True, slots=True)
class AblationLayout:
    """Files of an ablation.

    Attributes:
        root: Run directory of the ablation.
        base_model: Checkpoint that all variants start from.
    """

    root: Path
    base_model: Path

    def run_dir(self, seed: int, variant: str) -> Path:
        """Run directory of one seed and variant."""
        return self.root / f"seed{seed}" / variant

    def evaluated_model(self, seed: int, variant: str) -> Path:
        """Model that a variant is evaluated with."""
        if variant == WITHOUT_RL:
            return self.initial_model(seed, variant)
        return self.run_dir(seed, variant) / "models" / RL

    def initial_model(self, seed: int, variant: str) -> Path:
        """Model that RL of a variant starts from."""
        if variant == WITHOUT_COLD_START:
            return self.base_model
        return self.cold_start_model(
            seed, StageKind.EXEMPLARS if variant == WITHOUT_REFLECTION else StageKind.REFLECTIONS
        )

    def cold_start_model(self, seed: int, kind: StageKind) -> Path:
        """Model of a cold start."""
        return self.run_dir(seed, COLD_START) / "models" / kind

    def policy_episodes(self, seed: int) -> Path:
        """Episodes of the policy that was trained on exemplars only."""
        return self.run_dir(seed, COLD_START) / "reflection" / "policy_episodes.jsonl"

    def reflections(self, seed: int) -> Path:
        """Corrected episodes."""
        return self.run_dir(seed, COLD_START) / "reflection" / "reflections.jsonl"

    def eval_results(self, seed: int, variant: str) -> Path:
        """Log of the evaluation on the test questions."""
        return eval_log_path(self.run_dir(seed, variant), eval_stage_name(variant))

    def is_done(self, stage: AblationStage, questions: int) -> bool:
        """Return whether the output of a stage exists. `questions` is the number of test questions."""
        if stage.kind is StageKind.EVALUATE:
            return count_answered(self.eval_results(stage.seed, stage.variant)) >= questions
        output = {
            StageKind.RL: self.evaluated_model(stage.seed, stage.variant),
            StageKind.REFLECT: self.reflections(stage.seed),
        }.get(stage.kind, self.cold_start_model(stage.seed, stage.kind))
        return output.exists()


def eval_stage_name(variant: str) -> str:
    """Return the stage name of a variant's evaluation, as in the variant's report."""
    return COLD_START if variant == WITHOUT_RL else RL


def measure_stage_seconds(layout: AblationLayout, done: Iterable[AblationStage]) -> dict[StageKind, float]:
    """Return the mean duration of each stage kind over the stages that are done."""
    durations: defaultdict[StageKind, list[float]] = defaultdict(list)
    for stage in done:
        if seconds := stage_seconds(layout.run_dir(stage.seed, stage.variant)).get(stage.kind):
            durations[stage.kind].append(seconds)
    return {kind: fmean(seconds) for kind, seconds in durations.items()}


def estimate_remaining_s(stages: Iterable[AblationStage], measured: Mapping[StageKind, float]) -> float:
    """Estimate the duration of `stages` from measured or default durations."""
    return sum(measured.get(stage.kind, DEFAULT_STAGE_SECONDS[stage.kind]) for stage in stages)
