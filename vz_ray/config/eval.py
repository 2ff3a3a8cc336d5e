"""Config of evaluation metrics."""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.config.validation import InvalidValueError, check_min

SAMPLING_STRATEGY_PATTERN = r"all|(?:first|end|random):\d+|\d+(?:\.\d+)?%"
"""Regular expression (full match) of `sampling_strategy`."""


@dataclass
class EvalConfig:
    """Confidence intervals of evaluation metrics."""

    bootstrap_resamples: int = 2000
    """Bootstrap resamples per interval."""
    confidence_level: float = 0.95
    """Confidence level of the intervals."""
    seed: int = 0
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        check_min(self, 100, "bootstrap_resamples")
        if not 0 < self.confidence_level < 1:
            raise InvalidValueError("confidence_level", f"is {self.confidence_level}; it must be above 0 and below 1")
