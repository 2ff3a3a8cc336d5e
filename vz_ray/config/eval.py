"""Config of evaluation metrics."""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.config.fields import Section, number

SAMPLING_STRATEGY_PATTERN = r"all|(?:first|end|random):\d+|\d+(?:\.\d+)?%"
"""Regular expression (full match) of `sampling_strategy`."""


@dataclass
class EvalConfig(Section):
    """Confidence intervals of evaluation metrics."""

    bootstrap_resamples: int = number(2000, minimum=100)
    """Bootstrap resamples per interval."""
    confidence_level: float = number(0.95, above=0, below=1)
    """Confidence level of the intervals."""
    seed: int = 0
    """Seed of the bootstrap."""
