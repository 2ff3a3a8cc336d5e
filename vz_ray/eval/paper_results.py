"""The paper's own numbers, from `load_paper_results.yaml`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import yaml


@dataclass(frozen=True, slots=True)
class PaperResults:
    """Numbers to stand beside one's own, per cent.

    Attributes:
        source: Where they are from.
        shown: The models that tables show, in order.
        figures: By benchmark, figure (`table/name`, or a headline's name) and model.
        zooms: By benchmark: at most 0, 1, 2, ... zooms.
        mean_zooms: Zooms in an episode on average, by model; "about", it says, and "towards 0".
    """

    source: str
    shown: Sequence[str]
    figures: Mapping[str, Mapping[str, Mapping[str, float]]]
    zooms: Mapping[str, Sequence[float]]
    mean_zooms: Mapping[str, float]

    def models_for(self, benchmark: str, figure: str) -> Mapping[str, float]:
        """By model; empty where the paper says nothing."""
        return self.figures.get(benchmark, {}).get(figure, {})


@lru_cache
def load_paper_results() -> PaperResults:
    """What the package brings."""
    text = files("vz_ray.eval").joinpath("paper.yaml").read_text(encoding="utf-8")
    return PaperResults(**yaml.safe_load(text))
