"""Configuration of evaluation figures."""

from __future__ import annotations

from dataclasses import dataclass

SAMPLING_STRATEGY_PATTERN = r"all|(?:first|end|random):\d+|\d+(?:\.\d+)?%"
"""Which questions of a set are played; a regular expression of the whole."""


@dataclass
class EvalConfig:
    """How figures are taken from played episodes.

    Attributes:
        bootstrap_resamples: Resamples behind each interval.
        confidence_level: Coverage of the intervals.
        seed: Seed of the resampling.
    """

    bootstrap_resamples: int = 2000
    confidence_level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bootstrap_resamples < 100:
            raise ValueError(
                f"eval.bootstrap_resamples is {self.bootstrap_resamples}; fewer than 100 resamples make no interval"
            )
        if not 0 < self.confidence_level < 1:
            raise ValueError(f"eval.confidence_level is {self.confidence_level}; it must lie between 0 and 1")
