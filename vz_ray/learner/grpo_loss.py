"""GRPO loss of one micro-batch (policy loss, KL, entropy) and its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vz_ray.config.learner import LossConfig
from vz_ray.learner.loss import (
    clipped_policy_loss,
    importance_ratio,
    low_variance_kl,
    truncated_importance_weights,
)

Sums = dict[str, float]


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Constant inputs of the loss. B trajectories of at most S sampled tokens.

    Attributes:
        advantages: `[B]`.
        weights: `[B]` weight of each trajectory; see `loss.loss_weights`.
        mask: `[B, S]`.
        old_logprobs: `[B, S]` log-probs before the first update of the step.
        engine_logprobs: `[B, S]` log-probs of the engine, NaN in external turns.
        ref_logprobs: `[B, S]` log-probs of the reference model; None without one.
    """

    advantages: Tensor
    weights: Tensor
    mask: Tensor
    old_logprobs: Tensor
    engine_logprobs: Tensor
    ref_logprobs: Tensor | None


def grpo_loss(logprobs: Tensor, entropy: Tensor, inputs: LossInputs, config: LossConfig) -> tuple[Tensor, Sums]:
    """Return this micro-batch's part of the batch loss, a scalar, and sums for the metrics.

    Args:
        logprobs: `[B, S]`, with gradient.
        entropy: `[B, S]`, with gradient.
    """
    weight = inputs.mask * inputs.weights[:, None]
    ratio = importance_ratio(logprobs, inputs.old_logprobs, inputs.mask, config.importance_sampling_level)
    policy = clipped_policy_loss(ratio, inputs.advantages, config.clip_ratio_low, config.clip_ratio_high)
    if config.tis_cap is not None:
        policy = policy * truncated_importance_weights(inputs.old_logprobs, inputs.engine_logprobs, config.tis_cap)
    loss = (policy * weight).sum()
    sums = {"policy_loss": float(loss.detach())}
    if config.entropy_coef:
        loss = loss - config.entropy_coef * (entropy * weight).sum()
    if inputs.ref_logprobs is not None:
        kl = low_variance_kl(logprobs, inputs.ref_logprobs)
        loss = loss + config.kl_coef * (kl * weight).sum()
        sums["kl"] = _sum(kl, inputs.mask)
    positive = inputs.advantages[:, None] > 0
    sums |= {
        "loss": float(loss.detach()),
        "entropy": _sum(entropy, inputs.mask),
        "clip_high": _sum((ratio > 1 + config.clip_ratio_high) & positive, inputs.mask),
        "clip_low": _sum((ratio < 1 - config.clip_ratio_low) & ~positive, inputs.mask),
        "sampled": float(inputs.mask.sum()),
    }
    return loss, sums


def engine_mismatch(old: Tensor, engine: Tensor, subsets: Mapping[str, Tensor]) -> tuple[Sums, dict[str, float]]:
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
    sums: Sums = {}
    maxima: dict[str, float] = {}
    for subset, mask in subsets.items():
        compared = mask * (~engine.isnan())
        sums |= {f"mismatch_kl{subset}": _sum(kl, compared), f"compared{subset}": float(compared.sum())}
        maxima[f"mismatch_abs_max{subset}"] = float((difference * compared).abs().max()) if difference.numel() else 0.0
    return sums, maxima


def _sum(values: Tensor, mask: Tensor) -> float:
    return float((values.detach() * mask).sum())
