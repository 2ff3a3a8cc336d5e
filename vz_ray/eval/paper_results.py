"""Published results of the VideoZoomer paper, from `paper_results.yaml`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import yaml


@dataclass(frozen=True, slots=True)
class PaperResults:
    """Published numbers in percent, shown as a reference.

    Attributes:
        source: Citation.
        models: Models to show in tables, in order.
        metrics: Values by benchmark, metric (`table/name`, or the name of a headline) and model.
        accuracy_by_max_zooms: Accuracies with a maximum of 0, 1, 2, ... zooms, by benchmark.
        mean_zooms: Mean zooms per episode, by model.
    """

    source: str
    models: Sequence[str]
    metrics: Mapping[str, Mapping[str, Mapping[str, float]]]
    accuracy_by_max_zooms: Mapping[str, Sequence[float]]
    mean_zooms: Mapping[str, float]

    def values_by_model(self, benchmark: str, metric: str) -> Mapping[str, float]:
        """Return the published values of a metric by model; empty if the paper has none."""
        return self.metrics.get(benchmark, {}).get(metric, {})


@lru_cache
def load_paper_results() -> PaperResults:
    """Load the packaged results."""
    text = files("vz_ray.eval").joinpath("paper_results.yaml").read_text(encoding="utf-8")
    return PaperResults(**yaml.safe_load(text))
