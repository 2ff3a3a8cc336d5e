"""Configuration of rewards."""

from __future__ import annotations

import math
from dataclasses import dataclass

SCORERS = ("clean", "compat")


@dataclass
class RewardConfig:
    """How an episode is scored.

    Attributes:
        accuracy: Weight of a right answer (paper: 0.9).
        format: Weight of a well-formed transcript (paper: 0.1).
        tool: Paid on top when the answer is right and a zoom was carried out (paper: 0.5).
        scorer: `clean` reads the usual ways to name an option inside the
            answer span and counts zooms carried out; `compat` scores as the
            released VideoZoomer code does and counts attempted zooms.
        max_zoom_frames: Frames that one well-formed zoom may ask for (paper: 16).
        number_rel_tol: Relative tolerance for ground truths that are not
            integers; integers must be equal.
    """

    accuracy: float = 0.9
    format: float = 0.1
    tool: float = 0.5
    scorer: str = "clean"
    max_zoom_frames: int = 16
    number_rel_tol: float = 0.01

    def __post_init__(self) -> None:
        for name in ("accuracy", "format", "tool", "number_rel_tol"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"reward.{name} is {value}; it must be finite and not negative")
        if self.scorer not in SCORERS:
            raise ValueError(f"reward.scorer is {self.scorer!r}; choose one of {', '.join(SCORERS)}")
        if self.max_zoom_frames < 1:
            raise ValueError(f"reward.max_zoom_frames is {self.max_zoom_frames}; it must be at least 1")
