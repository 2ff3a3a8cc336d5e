"""Bootstrap intervals of means.

Questions about one video are not independent, so whole videos are drawn: the
cluster bootstrap (percentile intervals). Where a figure is a mean over several
trainings, trainings are drawn as well, independently of videos.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class ConfidenceInterval:
    """A mean, the bounds of its interval, and how many values it rests on."""

    mean: float
    low: float
    high: float
    count: int


def bootstrap_mean(
    values: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    num_resamples: int = 2000,
    confidence_level: float = 0.95,
    seed: int = 0,
) -> ConfidenceInterval:
    """Mean of `values` with its percentile interval.

    Args:
        values: `[N]`.
        clusters: `[N]`, what each value belongs to (its video); drawn whole.
        num_resamples: Resamples.
        confidence_level: Coverage.
        seed: Seed of the draws.

    Raises:
        ValueError: No values, or not one cluster per value.
    """
    if not values:
        raise ValueError("no values to take an interval of")
    labels = list(range(len(values))) if clusters is None else list(clusters)
    if len(labels) != len(values):
        raise ValueError(f"{len(labels)} clusters for {len(values)} values")
    index = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    sums, counts = np.zeros(len(index)), np.zeros(len(index))
    for value, label in zip(values, labels, strict=True):
        sums[index[label]] += value
        counts[index[label]] += 1
    drawn = np.random.default_rng(seed).integers(0, len(index), size=(num_resamples, len(index)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - confidence_level) / 2, (1 + confidence_level) / 2])
    return ConfidenceInterval(float(sums.sum() / counts.sum()), float(low), float(high), len(values))


def paired_difference(
    ours: Mapping[str, float],
    theirs: Mapping[str, float],
    clusters: Mapping[str, Hashable] | None = None,
    *,
    num_resamples: int = 2000,
    confidence_level: float = 0.95,
    seed: int = 0,
) -> ConfidenceInterval:
    """Mean of `ours - theirs` over the tasks that both have, by task id.

    Raises:
        ValueError: They have no task in common.
    """
    common = [task for task in ours if task in theirs]
    if not common:
        raise ValueError(f"no task in common between {len(ours)} and {len(theirs)} results")
    return bootstrap_mean(
        [ours[task] - theirs[task] for task in common],
        None if clusters is None else [clusters[task] for task in common],
        num_resamples=num_resamples,
        confidence_level=confidence_level,
        seed=seed,
    )


def crossed_bootstrap(
    runs: Sequence[Mapping[str, float]],
    clusters: Mapping[str, Hashable],
    *,
    num_resamples: int = 2000,
    confidence_level: float = 0.95,
    seed: int = 0,
) -> ConfidenceInterval:
    """Mean over runs and tasks; both runs and whole clusters are drawn, each with replacement.

    With one run it says nothing about other runs: it is `bootstrap` over the clusters.

    Args:
        runs: Of each training, a value by task id; a difference of two trainings, for a paired one.
        clusters: What each task belongs to (its video), by task id.
        num_resamples: Resamples.
        confidence_level: Coverage.
        seed: Seed of the draws.

    Raises:
        ValueError: A run has no values.
    """
    if not runs or not all(runs):
        raise ValueError(f"{sum(map(bool, runs))} of {len(runs)} runs have values to take an interval of")
    index = {label: i for i, label in enumerate({clusters[task]: None for run in runs for task in run})}
    sums, counts = np.zeros((len(runs), len(index))), np.zeros((len(runs), len(index)))
    for row, run in enumerate(runs):
        for task, value in run.items():
            sums[row, index[clusters[task]]] += value
            counts[row, index[clusters[task]]] += 1
    rng = np.random.default_rng(seed)
    # How often each run and each cluster is drawn, `[samples, runs]` and `[samples, clusters]`.
    rows, columns = (
        rng.multinomial(size, np.full(size, 1 / size), size=num_resamples).astype(float)
        for size in sums.shape
    )
    drawn = ((rows @ counts) * columns).sum(axis=1)
    means = ((rows @ sums) * columns).sum(axis=1)[drawn > 0] / drawn[drawn > 0]
    low, high = np.quantile(means, [(1 - confidence_level) / 2, (1 + confidence_level) / 2])
    return ConfidenceInterval(float(sums.sum() / counts.sum()), float(low), float(high), int(counts.sum()))
