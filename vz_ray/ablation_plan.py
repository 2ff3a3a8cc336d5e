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

from vz_ray.config.ablate import (
    VARIANTS,
    WITHOUT_COLD_START,
    WITHOUT_REFLECTION,
    WITHOUT_RL,
    WITHOUT_TOOL_REWARD,
    title_of,
)
from vz_ray.evaluate.results import answered
from vz_ray.evaluate.summary import COLD_START, RL, eval_path, stage_seconds


class Part(StrEnum):
    """What a stage does; also under which name its time is noted."""

    EXEMPLARS = "exemplars"
    """The base learns from exemplars alone."""
    REFLECT = "reflect"
    """That policy plays, and its wrong zooms are corrected."""
    REFLECTIONS = "reflections"
    """The base learns from exemplars and reflections, for as many steps."""
    RL = "rl"
    EVALUATE = "evaluate"


EXPECTED_S = {
    Part.EXEMPLARS: 75.0,
    Part.REFLECT: 40.0,
    Part.REFLECTIONS: 100.0,
    Part.RL: 400.0,
    Part.EVALUATE: 130.0,
}
"""Seconds of each at the quickstart's size on two cores, until one has been timed."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One piece of work; what it makes is there whole or not at all.

    Attributes:
        seed: Of the run.
        variant: Whose it is; `cold_start` for what variants share.
        part: What is done.
    """

    seed: int
    variant: str
    part: Part

    def __str__(self) -> str:
        return f"seed {self.seed}, {title_of(self.variant)}: {self.part}"


def stages(seeds: Sequence[int], variants: Sequence[str]) -> list[Stage]:
    """Everything, in an order in which the engines are started again at most once a seed."""
    found: list[Stage] = []
    for index, seed in enumerate(seeds):
        found += [Stage(seed, COLD_START, part) for part in (Part.EXEMPLARS, Part.REFLECT, Part.REFLECTIONS)]
        if WITHOUT_RL in variants:
            found.append(Stage(seed, WITHOUT_RL, Part.EVALUATE))
        trained = [variant for variant in VARIANTS if variant in variants and variant != WITHOUT_RL]
        # Engines that do not pay the tool reward go on with the next seed as they are.
        trained.sort(key=lambda variant: (variant == WITHOUT_TOOL_REWARD) != bool(index % 2))
        for variant in trained:
            found += [Stage(seed, variant, part) for part in (Part.RL, Part.EVALUATE)]
    return found


@dataclass(frozen=True, slots=True)
class Tree:
    """Where everything of an ablation lies.

    Attributes:
        root: Its run directory.
        base: The model that all variants begin with.
    """

    root: Path
    base: Path

    def folder(self, seed: int, variant: str) -> Path:
        """A run directory of its own for each seed and variant."""
        return self.root / f"seed{seed}" / variant

    def trained(self, seed: int, variant: str) -> Path:
        """The model that a variant is evaluated with."""
        if variant == WITHOUT_RL:
            return self.start(seed, variant)
        return self.folder(seed, variant) / "models" / RL

    def start(self, seed: int, variant: str) -> Path:
        """The model that a variant's reinforcement learning starts from."""
        if variant == WITHOUT_COLD_START:
            return self.base
        return self.cold(seed, Part.EXEMPLARS if variant == WITHOUT_REFLECTION else Part.REFLECTIONS)

    def cold(self, seed: int, part: Part) -> Path:
        """A cold start's model."""
        return self.folder(seed, COLD_START) / "models" / part

    def played(self, seed: int) -> Path:
        """What the policy played after exemplars alone."""
        return self.folder(seed, COLD_START) / "reflection" / "played.jsonl"

    def reflections(self, seed: int) -> Path:
        """What came of its wrong episodes."""
        return self.folder(seed, COLD_START) / "reflection" / "reflections.jsonl"

    def answers(self, seed: int, variant: str) -> Path:
        """The answers to the test questions."""
        return eval_path(self.folder(seed, variant), evaluated_as(variant))

    def done(self, stage: Stage, questions: int) -> bool:
        """Whether a stage's product is there; `questions` is how many there are to be answered."""
        if stage.part is Part.EVALUATE:
            return answered(self.answers(stage.seed, stage.variant)) >= questions
        product = {
            Part.RL: self.trained(stage.seed, stage.variant),
            Part.REFLECT: self.reflections(stage.seed),
        }.get(stage.part, self.cold(stage.seed, stage.part))
        return product.exists()


def evaluated_as(variant: str) -> str:
    """Under which stage a variant's evaluation is kept: what its own report shows."""
    return COLD_START if variant == WITHOUT_RL else RL


def timed(tree: Tree, done: Iterable[Stage]) -> dict[Part, float]:
    """Mean seconds of each part, over the stages that are done."""
    found: defaultdict[Part, list[float]] = defaultdict(list)
    for stage in done:
        if seconds := stage_seconds(tree.folder(stage.seed, stage.variant)).get(stage.part):
            found[stage.part].append(seconds)
    return {part: fmean(seconds) for part, seconds in found.items()}


def left_s(left: Iterable[Stage], measured: Mapping[Part, float]) -> float:
    """Seconds that these stages will take, as far as one can tell."""
    return sum(measured.get(stage.part, EXPECTED_S[stage.part]) for stage in left)
