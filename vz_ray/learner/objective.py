"""The whole RL objective of one micro-batch: policy loss, KL, entropy, and what to log of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vz_ray.config.learner import LossConfig
from vz_ray.learner.loss import clipped_loss, importance_ratio, low_variance_kl, truncated_importance

Sums = dict[str, float]


@dataclass(frozen=True, slots=True)
class Given:
    """What is fixed while the weights move. B trajectories of at most S sampled tokens.

    Attributes:
        advantage: `[B]`.
        weight: `[B]`, of the sum over a trajectory's tokens in the batch's loss.
        mask: `[B, S]`.
        old: `[B, S]` log-probs before the iteration's first update.
        engine: `[B, S]` log-probs that came with the trajectories, NaN where there are none.
        reference: `[B, S]` log-probs of the reference model, if there is one.
    """

    advantage: Tensor
    weight: Tensor
    mask: Tensor
    old: Tensor
    engine: Tensor
    reference: Tensor | None


def objective(logprobs: Tensor, entropy: Tensor, given: Given, config: LossConfig) -> tuple[Tensor, Sums]:
    """The loss (a scalar, this micro-batch's share of the batch's) and sums for the metrics.

    Args:
        logprobs: `[B, S]`, with gradient.
        entropy: `[B, S]`, with gradient.
    """
    weight = given.mask * given.weight[:, None]
    ratio = importance_ratio(logprobs, given.old, given.mask, config.ratio)
    policy = clipped_loss(ratio, given.advantage, config.clip_low, config.clip_high)
    if config.importance_cap is not None:
        policy = policy * truncated_importance(given.old, given.engine, config.importance_cap)
    loss = (policy * weight).sum()
    sums = {"policy_loss": float(loss.detach())}
    if config.entropy:
        loss = loss - config.entropy * (entropy * weight).sum()
    if given.reference is not None:
        kl = low_variance_kl(logprobs, given.reference)
        loss = loss + config.kl * (kl * weight).sum()
        sums["kl"] = _sum(kl, given.mask)
    up = given.advantage[:, None] > 0
    sums |= {
        "loss": float(loss.detach()),
        "entropy": _sum(entropy, given.mask),
        "clip_high": _sum((ratio > 1 + config.clip_high) & up, given.mask),
        "clip_low": _sum((ratio < 1 - config.clip_low) & ~up, given.mask),
        "sampled": float(given.mask.sum()),
    }
    return loss, sums


def mismatch(old: Tensor, engine: Tensor, parts: Mapping[str, Tensor]) -> tuple[Sums, dict[str, float]]:
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
