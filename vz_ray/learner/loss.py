"""Terms of the policy loss as pure functions: B trajectories, T sampled tokens each (padded), float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# exp(20) is finite in float32; larger log-ratios indicate a bug and appear in `ratio_max`.
_MAX_LOG_RATIO = 20.0


def importance_ratio(new: Tensor, old: Tensor, mask: Tensor, kind: str = "token") -> Tensor:
    """Return the importance ratio of new to old policy, `[B, T]`.

    Args:
        new: `[B, T]` log-probs under the weights being trained.
        old: `[B, T]` log-probs before the first update of the step.
        mask: `[B, T]`, 1 on sampled tokens.
        kind: `token`: exp(new - old), as in GRPO; `sequence`: the geometric mean over the trajectory for all
            its tokens, as in GSPO (arXiv 2507.18071).
    """
    log_ratio = (new - old) * mask
    if kind == "sequence":
        log_ratio = (log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)).expand_as(new)
    return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def clipped_policy_loss(ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A), `[B, T]`; `advantage` is `[B]`.

    The asymmetric clip (0.2 / 0.27 in the paper) allows larger increases than decreases of a token's
    probability.
    """
    a = advantage[:, None]
    return -torch.minimum(ratio * a, ratio.clamp(1 - clip_low, 1 + clip_high) * a)


def low_variance_kl(new: Tensor, reference: Tensor) -> Tensor:
    """Return the k3 estimate of KL(new || reference) per token, `[B, T]`; never negative.

    exp(d) - d - 1 with d = reference - new (Schulman, "Approximating KL divergence").
    """
    d = (reference - new).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return d.exp() - d - 1


def truncated_importance_weights(old: Tensor, engine: Tensor, cap: float) -> Tensor:
    """Return min(exp(old - engine), cap), `[B, T]`: corrects for differences between engine and learner.

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
