"""The ablation: the loop without one of its parts at a time, several seeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vz_ray.config.data import SynthConfig
from vz_ray.config.quickstart import QuickstartConfig

FULL = "full"
WITHOUT_RL = "without_rl"
WITHOUT_COLD_START = "without_cold_start"
WITHOUT_REFLECTION = "without_reflection"
WITHOUT_TOOL_REWARD = "without_tool_reward"
VARIANTS = (FULL, WITHOUT_RL, WITHOUT_COLD_START, WITHOUT_REFLECTION, WITHOUT_TOOL_REWARD)
"""In the order of the paper's table."""


def variant_title(variant: str) -> str:
    """A variant's name for people."""
    return variant.replace("_", " ").replace(" rl", " RL")


@dataclass
class ReflectionConfig:
    """How the cold start's reflections are made: the policy's wrong zooms, corrected."""

    samples_per_task: int = 4
    """Episodes that the policy plays of each of the cold start's tasks, after exemplars alone."""
    temperature: float = 1.0
    """Their sampling temperature."""
    max_per_task: int = 2
    """Most wrong episodes of one task that an expert goes on from."""
    max_reflections: int = 96
    """Most reflections that are learned from beside the exemplars; which ones is drawn."""

    def __post_init__(self) -> None:
        for name in ("samples_per_task", "max_per_task", "max_reflections"):
            if getattr(self, name) < 1:
                raise ValueError(f"reflection.{name} is {getattr(self, name)}; it must be at least 1")
        if self.temperature <= 0:
            raise ValueError(
                f"reflection.temperature is {self.temperature}; it must be above 0, or all samples are alike"
            )


@dataclass
class AblationConfig(QuickstartConfig):
    """The quickstart's cold start and loop, once for each seed and variant.

    The quickstart's controls (`sft_continued`, `baseline`) are no variants, and are not trained.
    """

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Each makes every variant once; figures are means over them."""
    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    """Which of `full` and `without_rl`, `_cold_start`, `_reflection`, `_tool_reward`; all are compared
    with `full`, which is always one."""
    reflection: ReflectionConfig = field(default_factory=ReflectionConfig)
    """What the cold start learns from beside exemplars."""
    test_synth: SynthConfig = field(default_factory=SynthConfig)
    """The needle videos that all variants are asked about, in a directory of their own; see `data.test`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds is {self.seeds}; it needs different seeds, none of them negative")
        if self.seed:
            raise ValueError(
                f"seed is {self.seed}; every variant runs with each of `seeds`, set those instead"
            )
        for variant in self.variants:
            if variant not in VARIANTS:
                raise ValueError(f"variants has {variant!r}; it may hold {', '.join(VARIANTS)}")
        if FULL not in self.variants or len(set(self.variants)) < len(self.variants):
            raise ValueError(f"variants is {self.variants}; it needs {FULL!r}, and each variant once")
        if not self.reward.tool and WITHOUT_TOOL_REWARD in self.variants:
            raise ValueError(
                f"reward.tool is {self.reward.tool:g}; {WITHOUT_TOOL_REWARD} would be the same as {FULL}"
            )
        own = Path(self.test_synth.directory) / "test.json"
        if Path(self.data.test) != own:
            raise ValueError(
                f"data.test is {self.data.test}; the questions are those of test_synth, set it to {own}"
            )
