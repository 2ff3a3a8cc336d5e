"""The GRPO loss of one micro-batch.

B trajectories, S sampled tokens each (padded), float32. The parts are in `advantages`, `policy_loss`, `off_policy`
and `kl`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vz_ray.config.loss import LossConfig
from vz_ray.learner.kl import distillation_advantages, estimate_kl
from vz_ray.learner.off_policy import rejection_mask, truncated_importance_weights
from vz_ray.learner.policy_loss import POLICY_LOSSES, importance_ratio

Sums = dict[str, float]


def loss_weights(lengths: Sequence[int], aggregation: str, fixed_length: int) -> list[float]:
    """Return one weight per trajectory; the loss is the sum of all token losses times these weights.

    The weights depend on the whole batch, so that the losses of micro-batches and ranks add up.

    Args:
        lengths: Number of tokens with a loss of each trajectory of the batch. A trajectory of length 0 gets the weight
            0 and does not count.
        aggregation: `sequence_mean` (1 / (N len)), `token_mean` (1 / total tokens)
            or `fixed_length` (1 / (N fixed_length)).
    """
    count, total = sum(length > 0 for length in lengths), sum(lengths)
    divisors = {
        "sequence_mean": [count * length for length in lengths],
        "token_mean": [total] * len(lengths),
        "fixed_length": [count * fixed_length] * len(lengths),
    }
    if aggregation not in divisors:
        raise ValueError(f"aggregation is {aggregation!r}; it must be one of {', '.join(divisors)}")
    return [1.0 / divisor if length else 0.0 for length, divisor in zip(lengths, divisors[aggregation], strict=True)]


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Constant inputs of the loss. B trajectories of at most S sampled tokens.

    Attributes:
        advantages: `[B, S]`, or `[B, 1]` for one per trajectory.
        weights: `[B, S]` or `[B, 1]`, weight of each token's loss; see `loss_weights`.
        mask: `[B, S]`.
        old_logprobs: `[B, S]` log-probs before the first update of the step.
        engine_logprobs: `[B, S]` log-probs of the engine, NaN in external turns.
        ref_logprobs: `[B, S]` log-probs of the reference model; None without one.
        teacher_logprobs: `[B, S]` log-probs of the teacher; None without one.
    """

    advantages: Tensor
    weights: Tensor
    mask: Tensor
    old_logprobs: Tensor
    engine_logprobs: Tensor
    ref_logprobs: Tensor | None
    teacher_logprobs: Tensor | None = None


def grpo_loss(logprobs: Tensor, entropy: Tensor, inputs: LossInputs, config: LossConfig) -> tuple[Tensor, Sums]:
    """Return this micro-batch's part of the batch loss, a scalar, and sums for the metrics.

    Args:
        logprobs: `[B, S]`, with gradient.
        entropy: `[B, S]`, with gradient.
    """
    weight, sums = _token_weights(inputs, config)
    advantages, kl = inputs.advantages, None
    if inputs.ref_logprobs is not None:
        in_loss = config.kl_placement == "loss"
        new = logprobs if in_loss else inputs.old_logprobs
        kl = estimate_kl(new, inputs.ref_logprobs, config.kl_estimator, config.kl_cap)
        if not in_loss:
            advantages = advantages - config.kl_coef * kl
        sums["kl"] = _sum(kl, inputs.mask)
    if (teacher := inputs.teacher_logprobs) is not None:
        advantages = advantages + distillation_advantages(
            inputs.old_logprobs, teacher, config.teacher_coef, config.teacher_kl_cap
        )
        sums["teacher_kl"] = _sum(inputs.old_logprobs - teacher, inputs.mask)
    ratio = importance_ratio(logprobs, inputs.old_logprobs, inputs.mask, config.importance_sampling_level)
    policy = POLICY_LOSSES[config.policy_loss](logprobs, ratio, advantages, config)
    if config.tis_cap is not None:
        importance = truncated_importance_weights(
            inputs.old_logprobs, inputs.engine_logprobs, config.tis_cap, inputs.mask, config.tis_level
        )
        policy = policy * importance
        sums["truncated_weight_rate"] = _sum(importance >= config.tis_cap, inputs.mask)
    loss = (policy * weight).sum()
    sums["policy_loss"] = float(loss.detach())
    if config.entropy_coef:
        loss = loss - config.entropy_coef * (entropy * weight).sum()
    if kl is not None and config.kl_placement == "loss":
        loss = loss + config.kl_coef * (kl * weight).sum()
    sums |= {
        "loss": float(loss.detach()),
        "entropy": _sum(entropy, inputs.mask),
        **_clip_sums(ratio, advantages, inputs.mask, config),
        "sampled": float(inputs.mask.sum()),
    }
    return loss, sums


def _token_weights(inputs: LossInputs, config: LossConfig) -> tuple[Tensor, Sums]:
    """Return the weight of each token's loss, `[B, S]`, and sums of rejected tokens and trajectories.

    The weights of kept tokens do not depend on the rejected ones.
    """
    weight = inputs.mask * inputs.weights
    if config.rejection == "none":
        return weight, {}
    kept = inputs.mask * rejection_mask(
        inputs.old_logprobs, inputs.engine_logprobs, inputs.mask, config.rejection, config.rejection_band
    )
    sampled = inputs.mask.sum(-1) > 0
    return weight * kept, {
        "rejected_token_rate": float((inputs.mask - kept).sum()),
        "rejected_trajectory_rate": float((sampled & (kept.sum(-1) == 0)).sum()),
        "trajectories": float(sampled.sum()),
    }


def _clip_sums(ratio: Tensor, advantages: Tensor, mask: Tensor, config: LossConfig) -> Sums:
    """Return the numbers of tokens whose ratio is clipped."""
    high, low = ratio > 1 + config.clip_ratio_high, ratio < 1 - config.clip_ratio_low
    if config.policy_loss == "clip":
        # The minimum in the surrogate applies the clip to one sign of the advantage.
        high, low = high & (advantages > 0), low & ~(advantages > 0)
    sums = {"clip_high": _sum(high, mask), "clip_low": _sum(low, mask)}
    if config.clip_ratio_c is not None:
        sums["clip_dual"] = _sum((ratio > config.clip_ratio_c) & (advantages < 0), mask)
    return sums


def _sum(values: Tensor, mask: Tensor) -> float:
    return float((values.detach() * mask).sum())
