"""What an ablation has to do, in which order, and how long what is left will take.

    runs/<name>/seed0/cold_start/   exemplars -> reflect -> reflections
                      full/          rl -> evaluate     from `reflections`
                      without_rl/          evaluate     of   `reflections`
                      without_tool_reward/ rl -> ...    from `reflections`
                      without_reflection/  rl -> ...    from `exemplars`
                      without_cold_start/  rl -> ...    from the base

A stage is done when its product is there, whole; so a plan is gone on with by
making it again and leaving out what is done. Nothing is done here: this only looks
at what is there.
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
from vz_ray.monitoring.stage_times import stage_seconds


class StageKind(StrEnum):
    """What a stage does; also under which name its time is noted."""

    EXEMPLARS = "exemplars"
    """The base learns from exemplars alone."""
    REFLECT = "reflect"
    """That policy plays, and its wrong zooms are corrected."""
    REFLECTIONS = "reflections"
    """The base learns from exemplars and reflections, for as many steps."""
    RL = "rl"
    EVALUATE = "evaluate"


DEFAULT_STAGE_SECONDS = {
    StageKind.EXEMPLARS: 75.0,
    StageKind.REFLECT: 40.0,
    StageKind.REFLECTIONS: 100.0,
    StageKind.RL: 400.0,
    StageKind.EVALUATE: 130.0,
}
"""Seconds of each at the quickstart's size on two cores, until one has been timed."""


@dataclass(frozen=True, slots=True)
class AblationStage:
    """One piece of work; what it makes is there whole or not at all.

    Attributes:
        seed: Of the run.
        variant: Whose it is; `cold_start` for what variants share.
        kind: What is done.
    """

    seed: int
    variant: str
    kind: StageKind

    def __str__(self) -> str:
        return f"seed {self.seed}, {variant_title(self.variant)}: {self.kind}"


def plan_stages(seeds: Sequence[int], variants: Sequence[str]) -> list[AblationStage]:
    """Everything, in an order in which the engines are started again at most once a seed."""
    found: list[AblationStage] = []
    for index, seed in enumerate(seeds):
        found += [
            AblationStage(seed, COLD_START, part)
            for part in (StageKind.EXEMPLARS, StageKind.REFLECT, StageKind.REFLECTIONS)
        ]
        if WITHOUT_RL in variants:
            found.append(AblationStage(seed, WITHOUT_RL, StageKind.EVALUATE))
        trained = [variant for variant in VARIANTS if variant in variants and variant != WITHOUT_RL]
        # Engines that do not pay the tool reward go on with the next seed as they are.
        trained.sort(key=lambda variant: (variant == WITHOUT_TOOL_REWARD) != bool(index % 2))
        for variant in trained:
            found += [AblationStage(seed, variant, part) for part in (StageKind.RL, StageKind.EVALUATE)]
    return found


@dataclass(frozen=True, slots=True)
class AblationLayout:
    """Where everything of an ablation lies.

    Attributes:
        root: Its run directory.
        base_model: The model that all variants begin with.
    """

    root: Path
    base_model: Path

    def run_dir(self, seed: int, variant: str) -> Path:
        """A run directory of its own for each seed and variant."""
        return self.root / f"seed{seed}" / variant

    def evaluated_model(self, seed: int, variant: str) -> Path:
        """The model that a variant is evaluated with."""
        if variant == WITHOUT_RL:
            return self.initial_model(seed, variant)
        return self.run_dir(seed, variant) / "models" / RL

    def initial_model(self, seed: int, variant: str) -> Path:
        """The model that a variant's reinforcement learning starts from."""
        if variant == WITHOUT_COLD_START:
            return self.base_model
        return self.cold_start_model(
            seed, StageKind.EXEMPLARS if variant == WITHOUT_REFLECTION else StageKind.REFLECTIONS
        )

    def cold_start_model(self, seed: int, part: StageKind) -> Path:
        """A cold start's model."""
        return self.run_dir(seed, COLD_START) / "models" / part

    def policy_episodes(self, seed: int) -> Path:
        """What the policy played after exemplars alone."""
        return self.run_dir(seed, COLD_START) / "reflection" / "played.jsonl"

    def reflections(self, seed: int) -> Path:
        """What came of its wrong episodes."""
        return self.run_dir(seed, COLD_START) / "reflection" / "reflections.jsonl"

    def eval_results(self, seed: int, variant: str) -> Path:
        """The answers to the test questions."""
        return eval_log_path(self.run_dir(seed, variant), eval_stage_name(variant))

    def is_done(self, stage: AblationStage, questions: int) -> bool:
        """Whether a stage's product is there; `questions` is how many there are to be answered."""
        if stage.kind is StageKind.EVALUATE:
            return count_answered(self.eval_results(stage.seed, stage.variant)) >= questions
        product = {
            StageKind.RL: self.evaluated_model(stage.seed, stage.variant),
            StageKind.REFLECT: self.reflections(stage.seed),
        }.get(stage.kind, self.cold_start_model(stage.seed, stage.kind))
        return product.exists()


def eval_stage_name(variant: str) -> str:
    """Under which stage a variant's evaluation is kept: what its own report shows."""
    return COLD_START if variant == WITHOUT_RL else RL


def measure_stage_seconds(tree: AblationLayout, done: Iterable[AblationStage]) -> dict[StageKind, float]:
    """Mean seconds of each part, over the stages that are done."""
    found: defaultdict[StageKind, list[float]] = defaultdict(list)
    for stage in done:
        if seconds := stage_seconds(tree.run_dir(stage.seed, stage.variant)).get(stage.kind):
            found[stage.kind].append(seconds)
    return {part: fmean(seconds) for part, seconds in found.items()}


def estimate_remaining_s(left: Iterable[AblationStage], measured: Mapping[StageKind, float]) -> float:
    """Seconds that these stages will take, as far as one can tell."""
    return sum(measured.get(stage.kind, DEFAULT_STAGE_SECONDS[stage.kind]) for stage in left)
