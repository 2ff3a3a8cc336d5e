"""GRPO: advantages of a group, terms of the policy loss, the loss of one micro-batch and its metrics.

B trajectories, S sampled tokens each (padded), float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vz_ray.config.learner import LossConfig
from vz_ray.env.trajectory import Group

Sums = dict[str, float]

# exp(20) is finite in float32; larger log-ratios indicate a bug and appear in `ratio_max`.
_MAX_LOG_RATIO = 20.0

_SEQUENCE_OUTLIER = math.log(2)
"""A trajectory whose probability differs by more than a factor of 2 is an outlier."""


def compute_advantages(rewards: Sequence[float], kind: str = "grpo") -> NDArray[np.float64]:
    """Return the advantages within one group, `[n]`.

    `grpo` is (r - mean) / (std + 1e-6), with the sample standard deviation as in the released VideoZoomer
    code. `dr_grpo` is r - mean, which does not amplify groups with a small spread of rewards.

    Example: `compute_advantages([1, 0])` is about `[0.707, -0.707]`.
    """
    r = np.asarray(rewards, dtype=np.float64)
    centred = r - r.mean()
    if kind == "dr_grpo":
        return centred
    return centred / (_std(r) + 1e-6)


def is_informative(group: Group, min_std: float = 1e-4) -> bool:
    """Return whether all samples have valid rewards and the rewards differ.

    A sample without a valid reward excludes its whole group: a score of 0 would change the advantages of the
    other samples.
    """
    rewards = [t.reward for t in group.trajectories]
    if not rewards or any(reward is None or not reward.valid for reward in rewards):
        return False
    return _std(np.asarray(group.rewards)) >= min_std


def _std(rewards: NDArray[np.float64]) -> float:
    return float(rewards.std(ddof=1)) if len(rewards) > 1 else 0.0


def importance_ratio(new: Tensor, old: Tensor, mask: Tensor, kind: str = "token") -> Tensor:
    """Return the importance ratio of new to old policy, `[B, S]`.

    Args:
        new: `[B, S]` log-probs under the weights being trained.
        old: `[B, S]` log-probs before the first update of the step.
        mask: `[B, S]`, 1 on sampled tokens.
        kind: `token`: exp(new - old), as in GRPO; `sequence`: the geometric mean over the trajectory for all
            its tokens, as in GSPO (arXiv 2507.18071).
    """
    log_ratio = (new - old) * mask
    if kind == "sequence":
        log_ratio = (log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)).expand_as(new)
    return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def clipped_policy_loss(ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A), `[B, S]`; `advantage` is `[B]`.

    The asymmetric clip (0.2 / 0.27 in the paper) allows larger increases than decreases of a token's
    probability.
    """
    a = advantage[:, None]
    return -torch.minimum(ratio * a, ratio.clamp(1 - clip_low, 1 + clip_high) * a)


def low_variance_kl(new: Tensor, reference: Tensor) -> Tensor:
    """Return the k3 estimate of KL(new || reference) per token, `[B, S]`; never negative.

    exp(d) - d - 1 with d = reference - new (Schulman, "Approximating KL divergence").
    """
    d = (reference - new).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return d.exp() - d - 1


def truncated_importance_weights(old: Tensor, engine: Tensor, cap: float) -> Tensor:
    """Return min(exp(old - engine), cap), `[B, S]`: corrects for differences between engine and learner.

    The weight is 1 for tokens without an engine log-prob (NaN, in external turns).
    """
    return torch.nan_to_num(old - engine, nan=0.0).clamp(max=_MAX_LOG_RATIO).exp().clamp(max=cap)


def loss_weights(lengths: Sequence[int], aggregation: str, fixed_length: int) -> list[float]:
    """Return one weight per trajectory; the loss is the sum of all token losses times these weights.

    The weights depend on the whole batch, so that the losses of micro-batches and ranks add up.

    Args:
        lengths: Number of sampled tokens of each trajectory of the batch, each at least 1.
        aggregation: `sequence_mean` (1 / (N len)), `token_mean` (1 / total tokens)
            or `fixed_length` (1 / (N fixed_length)).
    """
    count = len(lengths)
    if aggregation == "sequence_mean":
        return [1.0 / (count * length) for length in lengths]
    if aggregation == "token_mean":
        return [1.0 / sum(lengths)] * count
    if aggregation == "fixed_length":
        return [1.0 / (count * fixed_length)] * count
    raise ValueError(f"aggregation is {aggregation!r}; it must be sequence_mean, token_mean or fixed_length")


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Constant inputs of the loss. B trajectories of at most S sampled tokens.

    Attributes:
        advantages: `[B]`.
        weights: `[B]` weight of each trajectory; see `loss_weights`.
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


def sequence_mismatch(old: Tensor, engine: Tensor, mask: Tensor) -> tuple[Sums, float]:
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


def _sum(values: Tensor, mask: Tensor) -> float:
    return float((values.detach() * mask).sum())
