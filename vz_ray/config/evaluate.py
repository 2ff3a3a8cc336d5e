"""Configuration of evaluation figures."""

from __future__ import annotations

from dataclasses import dataclass

SAMPLING = r"all|(?:first|end|random):\d+|\d+(?:\.\d+)?%"
"""Which questions of a set are played; a regular expression of the whole."""


@dataclass
class EvaluateConfig:
    """How figures are taken from played episodes.

    Attributes:
        bootstrap: Resamples behind each interval.
        level: Coverage of the intervals.
        seed: Seed of the resampling.
    """

    bootstrap: int = 2000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bootstrap < 100:
            raise ValueError(
                f"evaluate.bootstrap is {self.bootstrap}; fewer than 100 resamples make no interval"
            )
        if not 0 < self.level < 1:
            raise ValueError(f"evaluate.level is {self.level}; it must lie between 0 and 1")
