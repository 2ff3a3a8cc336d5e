"""Config of the ablation: training without one part at a time, over several seeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vz_ray.config.data import SynthConfig
from vz_ray.config.fields import InvalidValueError, Section, number
from vz_ray.config.quickstart import QuickstartConfig

FULL = "full"
WITHOUT_RL = "without_rl"
WITHOUT_COLD_START = "without_cold_start"
WITHOUT_REFLECTION = "without_reflection"
WITHOUT_TOOL_REWARD = "without_tool_reward"
VARIANTS = (FULL, WITHOUT_RL, WITHOUT_COLD_START, WITHOUT_REFLECTION, WITHOUT_TOOL_REWARD)
"""In the order of the paper's table."""


def variant_title(variant: str) -> str:
    """Display name of a variant."""
    return variant.replace("_", " ").replace(" rl", " RL")


@dataclass
class ReflectionConfig(Section):
    """Reflections of the cold start: corrected wrong zooms of the policy."""

    samples_per_task: int = number(4, minimum=1)
    """Episodes that the policy samples per cold-start task, after training on exemplars only."""
    temperature: float = number(1.0, above=0)
    """Sampling temperature of these episodes."""
    max_per_task: int = number(2, minimum=1)
    """Maximum wrong episodes per task that are corrected."""
    max_reflections: int = number(96, minimum=1)
    """Maximum reflections in the training data besides the exemplars, drawn at random."""


@dataclass
class AblationConfig(QuickstartConfig):
    """Config of `vz-ray ablate`: the quickstart's cold start and RL training for each seed and variant.

    The controls of the quickstart (`sft_continued`, `baseline`) are not variants and are not trained.
    """

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds; results are means over them."""
    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    """Variants: `full`, `without_rl`, `without_cold_start`, `without_reflection`, `without_tool_reward`; all
    are compared with `full`, which is required."""
    reflection: ReflectionConfig = field(default_factory=ReflectionConfig)
    """Reflections in the cold start's data."""
    test_synth: SynthConfig = field(default_factory=SynthConfig)
    """Needle videos of the test questions, in a separate directory; see `data.test`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise InvalidValueError("seeds", f"is {self.seeds}; it must list distinct, non-negative seeds")
        if self.seed:
            raise InvalidValueError("seed", f"is {self.seed}; set seeds instead")
        for variant in self.variants:
            if variant not in VARIANTS:
                raise InvalidValueError("variants", f"has {variant!r}; a variant must be one of {', '.join(VARIANTS)}")
        if FULL not in self.variants or len(set(self.variants)) < len(self.variants):
            raise InvalidValueError("variants", f"is {self.variants}; it must contain {FULL!r} and no duplicates")
        if not self.reward.tool and WITHOUT_TOOL_REWARD in self.variants:
            raise InvalidValueError(
                "reward.tool",
                f"is {self.reward.tool:g}; {WITHOUT_TOOL_REWARD} would equal {FULL}. Remove the variant.",
                "variants",
            )
        test_file = Path(self.test_synth.directory) / "test.json"
        if Path(self.data.test) != test_file:
            raise InvalidValueError(
                "data.test",
                f"is {self.data.test}; it must be the test file of test_synth, {test_file}",
                "test_synth.directory",
            )
