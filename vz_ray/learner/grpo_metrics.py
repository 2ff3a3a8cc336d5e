"""Metrics of one GRPO step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from vz_ray.learner.batch import MicroBatch
from vz_ray.learner.distributed import RankInfo, all_reduce_max, all_reduce_sum
from vz_ray.learner.kl import low_variance_kl

Metrics = dict[str, float]

_SUBSETS = ("", "_after_image", "_after_text", "_stale")
"""Subsets of tokens that are compared with the engine separately: tokens of the current weights; of these,
tokens in turns after frames and after text only; tokens of older weights."""

_SEQUENCE_OUTLIER = math.log(2)
"""A trajectory whose probability differs by more than a factor of 2 is an outlier."""


class GrpoMetrics:
    """Accumulates sums over the micro-batches and updates of one step.

    Args:
        weight_version: Version of the weights before the step; tokens of other versions are stale. None treats
            all tokens as current.
    """

    def __init__(self, weight_version: int | None) -> None:
        self._weight_version = weight_version
        self._sums: dict[str, float] = {}
        self._ratio_max = self._sequence_max = 0.0
        self._mismatch_max = dict.fromkeys((f"mismatch_abs_max{subset}" for subset in _SUBSETS), 0.0)
        self._updates: list[Metrics] = []

    def add(self, sums: Metrics, log_ratio: Tensor, old_logprobs: Tensor, batch: MicroBatch) -> None:
        """Add a micro-batch.

        Args:
            sums: Sums of `grpo_loss`.
            log_ratio: `[B, S]` new minus old log-probs.
            old_logprobs: `[B, S]` the learner's log-probs, for the comparison with the engine.
        """
        masks = self._subset_masks(batch)
        mismatch, maxima = engine_mismatch(old_logprobs, batch.engine_logprobs, masks)
        sequences, sequence_max = sequence_mismatch(old_logprobs, batch.engine_logprobs, masks[""])
        for name, value in (sums | mismatch | sequences).items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._mismatch_max = {name: max(value, maxima[name]) for name, value in self._mismatch_max.items()}
        self._sequence_max = max(self._sequence_max, sequence_max)
        self._ratio_max = max(self._ratio_max, float((log_ratio * batch.mask).abs().max().exp()))

    def _subset_masks(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Return the mask `[B, S]` of each subset."""
        stale = torch.zeros_like(batch.mask)
        if self._weight_version is not None:
            stale = batch.mask * (batch.weight_versions != self._weight_version)
        fresh = batch.mask - stale
        masks = (fresh, fresh * batch.after_image, fresh * ~batch.after_image, stale)
        return dict(zip(_SUBSETS, masks, strict=True))

    def add_update(self, step_metrics: Metrics) -> None:
        """Add the metrics that `TrainEngine.step` returned."""
        self._updates.append(step_metrics)

    def compute(self, rank_info: RankInfo) -> Metrics:
        """Return the metrics over all ranks; every rank must call."""
        sums = all_reduce_sum(self._sums, rank_info)
        num_sampled, num_updates = sums.pop("sampled"), len(self._updates)
        applied = [update for update in self._updates if not update["skipped"]]
        metrics = {name: sums.pop(name) / num_updates for name in ("loss", "policy_loss")}
        for subset in _SUBSETS:
            kl, compared = sums.pop(f"mismatch_kl{subset}"), sums.pop(f"compared{subset}")
            maximum = all_reduce_max(self._mismatch_max[f"mismatch_abs_max{subset}"], rank_info)
            if compared or not subset:
                metrics[f"mismatch_kl{subset}"] = kl / max(compared, 1.0)
                metrics[f"mismatch_abs_max{subset}"] = maximum
        num_compared = max(sums.pop("compared_sequences"), 1.0)
        for name in ("mismatch_sequence_abs_mean", "mismatch_sequence_outlier_rate"):
            metrics[name] = sums.pop(name) / num_compared
        if "trajectories" in sums:
            metrics["rejected_trajectory_rate"] = sums.pop("rejected_trajectory_rate") / sums.pop("trajectories")
        metrics |= {name: value / num_sampled for name, value in sums.items()}
        grad_norms = [update["grad_norm"] for update in applied]
        return metrics | {
            "mismatch_sequence_abs_max": all_reduce_max(self._sequence_max, rank_info),
            "ratio_max": all_reduce_max(self._ratio_max, rank_info),
            "updates": float(len(applied)),
            "skipped": float(num_updates - len(applied)),
            "grad_norm": sum(grad_norms) / len(grad_norms) if grad_norms else float("inf"),
            "learning_rate": self._updates[-1]["learning_rate"],
        }


def engine_mismatch(old: Tensor, engine: Tensor, subsets: Mapping[str, Tensor]) -> tuple[Metrics, dict[str, float]]:
    """Compare the learner's log-probs with the engine's.

    `mismatch_kl` is the k3 estimate of KL(engine || learner) on the engine's samples. Tokens without an engine
    log-prob are ignored.

    Args:
        old: `[B, S]` log-probs of the learner.
        engine: `[B, S]` log-probs of the engine, NaN in external turns.
        subsets: Masks `[B, S]` by name; the name is appended to the metric names.

    Returns:
        Sums for the metrics, and the maximum absolute difference of each subset.
    """
    difference = torch.nan_to_num(old - engine, nan=0.0)
    kl = low_variance_kl(torch.zeros_like(difference), difference)
    sums: Metrics = {}
    maxima: dict[str, float] = {}
    for subset, mask in subsets.items():
        compared = mask * (~engine.isnan())
        sums |= {f"mismatch_kl{subset}": float((kl * compared).sum()), f"compared{subset}": float(compared.sum())}
        maxima[f"mismatch_abs_max{subset}"] = float((difference * compared).abs().max()) if difference.numel() else 0.0
    return sums, maxima


def sequence_mismatch(old: Tensor, engine: Tensor, mask: Tensor) -> tuple[Metrics, float]:
    """Compare the learner's log-probs of whole trajectories with the engine's.

    The difference of a trajectory is the sum over its tokens, the logarithm of the learner's probability over the
    engine's. Unlike token metrics it shows small errors that all have the same sign.

    Args:
        old: `[B, S]` log-probs of the learner.
        engine: `[B, S]` log-probs of the engine, NaN in external turns.
        mask: `[B, S]`, 1 on the compared tokens.

    Returns:
        Sums for the metrics, and the maximum absolute difference in nats.
    """
    compared = mask * (~engine.isnan())
    rows = compared.sum(-1) > 0
    difference = (torch.nan_to_num(old - engine, nan=0.0) * compared).sum(-1)[rows].abs()
    sums = {
        "mismatch_sequence_abs_mean": float(difference.sum()),
        "mismatch_sequence_outlier_rate": float((difference > _SEQUENCE_OUTLIER).sum()),
        "compared_sequences": float(rows.sum()),
    }
    return sums, float(difference.max()) if len(difference) else 0.0
