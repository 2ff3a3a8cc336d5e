"""Bootstrap confidence intervals of means.

Questions about one video are not independent, so the cluster bootstrap resamples
whole videos (percentile intervals). The crossed bootstrap also resamples training
runs, independently of videos. `EvalConfig` sets the resamples, the confidence level and the seed.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vz_ray.config.run import EvalConfig


@dataclass(frozen=True, slots=True)
class ConfidenceInterval:
    """A mean, the bounds of its confidence interval, and the number of values."""

    mean: float
    low: float
    high: float
    count: int


def bootstrap_mean(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None, config: EvalConfig | None = None
) -> ConfidenceInterval:
    """Return the mean of `values` with its percentile interval.

    Args:
        values: `[N]`.
        clusters: `[N]`, cluster (video) of each value. Default: one cluster per value.
        config: Settings of the interval.

    Raises:
        ValueError: `values` is empty, or `clusters` has another length.
    """
    config = config or EvalConfig()
    if not values:
        raise ValueError("values is empty; an interval needs at least 1 value")
    labels = list(range(len(values))) if clusters is None else list(clusters)
    if len(labels) != len(values):
        raise ValueError(f"clusters has {len(labels)} entries; it must have one per value ({len(values)})")
    index = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    sums, counts = np.zeros(len(index)), np.zeros(len(index))
    for value, label in zip(values, labels, strict=True):
        sums[index[label]] += value
        counts[index[label]] += 1
    rng = np.random.default_rng(config.seed)
    resampled = rng.integers(0, len(index), size=(config.bootstrap_resamples, len(index)))
    means = sums[resampled].sum(axis=1) / counts[resampled].sum(axis=1)
    return _interval(sums, counts, means, config)


def paired_difference(
    values: Mapping[str, float],
    baseline: Mapping[str, float],
    clusters: Mapping[str, Hashable] | None = None,
    config: EvalConfig | None = None,
) -> ConfidenceInterval:
    """Return the mean of `values - baseline` over common task ids, with its percentile interval.

    Raises:
        ValueError: `values` and `baseline` have no common task.
    """
    differences = common_differences(values, baseline)
    if not differences:
        raise ValueError(f"no task in common between {len(values)} and {len(baseline)} results")
    labels = None if clusters is None else [clusters[task] for task in differences]
    return bootstrap_mean(list(differences.values()), labels, config)


def common_differences(values: Mapping[str, float], baseline: Mapping[str, float]) -> dict[str, float]:
    """Return `values - baseline` of each common task id."""
    return {task: value - baseline[task] for task, value in values.items() if task in baseline}


def crossed_bootstrap(
    runs: Sequence[Mapping[str, float]], clusters: Mapping[str, Hashable], config: EvalConfig | None = None
) -> ConfidenceInterval:
    """Return the mean over runs and tasks; runs and whole clusters are resampled with replacement.

    With a single run this is `bootstrap_mean` over the clusters, without the variance between runs.

    Args:
        runs: Value by task id for each training run; for paired comparisons, differences of two runs.
        clusters: Cluster (video) of each task, by task id.
        config: Settings of the interval.

    Raises:
        ValueError: `runs` is empty, or a run has no values.
    """
    config = config or EvalConfig()
    if not runs or not all(runs):
        raise ValueError(f"{sum(map(bool, runs))} of {len(runs)} runs have values; every run needs at least 1")
    index = {label: i for i, label in enumerate({clusters[task]: None for run in runs for task in run})}
    sums, counts = np.zeros((len(runs), len(index))), np.zeros((len(runs), len(index)))
    for row, run in enumerate(runs):
        for task, value in run.items():
            sums[row, index[clusters[task]]] += value
            counts[row, index[clusters[task]]] += 1
    rng = np.random.default_rng(config.seed)
    # Multiplicity of each run and each cluster, `[resamples, runs]` and `[resamples, clusters]`.
    run_counts, cluster_counts = (
        rng.multinomial(size, np.full(size, 1 / size), size=config.bootstrap_resamples).astype(float)
        for size in sums.shape
    )
    totals = ((run_counts @ counts) * cluster_counts).sum(axis=1)
    means = ((run_counts @ sums) * cluster_counts).sum(axis=1)[totals > 0] / totals[totals > 0]
    return _interval(sums, counts, means, config)


def _interval(sums: Any, counts: Any, means: Any, config: EvalConfig) -> ConfidenceInterval:
    """Return the mean `sums / counts` with the percentiles of the resampled `means`."""
    level = config.confidence_level
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return ConfidenceInterval(float(sums.sum() / counts.sum()), float(low), float(high), int(counts.sum()))
