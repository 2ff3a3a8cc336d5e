"""The whole RL objective of one micro-batch: policy loss, KL, entropy, and what to log of them."""

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
    """What is fixed while the weights move. B trajectories of at most S sampled tokens.

    Attributes:
        advantages: `[B]`.
        weights: `[B]`, of the sum over a trajectory's tokens in the batch's loss.
        mask: `[B, S]`.
        old_logprobs: `[B, S]` log-probs before the iteration's first update.
        engine_logprobs: `[B, S]` log-probs that came with the trajectories, NaN where there are none.
        ref_logprobs: `[B, S]` log-probs of the reference model, if there is one.
    """

    advantages: Tensor
    weights: Tensor
    mask: Tensor
    old_logprobs: Tensor
    engine_logprobs: Tensor
    ref_logprobs: Tensor | None


def grpo_loss(
    logprobs: Tensor, entropy: Tensor, given: LossInputs, config: LossConfig
) -> tuple[Tensor, Sums]:
    """The loss (a scalar, this micro-batch's share of the batch's) and sums for the metrics.

    Args:
        logprobs: `[B, S]`, with gradient.
        entropy: `[B, S]`, with gradient.
    """
    weight = given.mask * given.weights[:, None]
    ratio = importance_ratio(logprobs, given.old_logprobs, given.mask, config.importance_sampling_level)
    policy = clipped_policy_loss(ratio, given.advantages, config.clip_ratio_low, config.clip_ratio_high)
    if config.tis_cap is not None:
        policy = policy * truncated_importance_weights(
            given.old_logprobs, given.engine_logprobs, config.tis_cap
        )
    loss = (policy * weight).sum()
    sums = {"policy_loss": float(loss.detach())}
    if config.entropy_coef:
        loss = loss - config.entropy_coef * (entropy * weight).sum()
    if given.ref_logprobs is not None:
        kl = low_variance_kl(logprobs, given.ref_logprobs)
        loss = loss + config.kl_coef * (kl * weight).sum()
        sums["kl"] = _sum(kl, given.mask)
    up = given.advantages[:, None] > 0
    sums |= {
        "loss": float(loss.detach()),
        "entropy": _sum(entropy, given.mask),
        "clip_high": _sum((ratio > 1 + config.clip_ratio_high) & up, given.mask),
        "clip_low": _sum((ratio < 1 - config.clip_ratio_low) & ~up, given.mask),
        "sampled": float(given.mask.sum()),
    }
    return loss, sums


def engine_mismatch(
    old: Tensor, engine: Tensor, parts: Mapping[str, Tensor]
) -> tuple[Sums, dict[str, float]]:
    """How far the learner is from the engine that sampled: sums for the metrics, and max |difference|.

    `mismatch_kl` is the k3 estimate of KL(engine || learner) on the engine's
    own samples; tokens without an engine log-prob do not count.

    Args:
        old: `[B, S]` the learner's log-probs.
        engine: `[B, S]` the engine's, NaN where there are none.
        parts: Masks `[B, S]` of tokens to tell apart; each name is appended to those of its sums.
    """
    gap = torch.nan_to_num(old - engine, nan=0.0)
    kl = low_variance_kl(torch.zeros_like(gap), gap)
    sums: Sums = {}
    worst: dict[str, float] = {}
    for part, mask in parts.items():
        known = mask * (~engine.isnan())
        sums |= {f"mismatch_kl{part}": _sum(kl, known), f"compared{part}": float(known.sum())}
        worst[f"mismatch_abs_max{part}"] = float((gap * known).abs().max()) if gap.numel() else 0.0
    return sums, worst


def _sum(values: Tensor, mask: Tensor) -> float:
    return float((values.detach() * mask).sum())
