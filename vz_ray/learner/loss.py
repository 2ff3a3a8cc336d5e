"""Policy losses as small pure functions. B trajectories, T sampled tokens each (padded), float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# exp(20) is finite in float32; a log-ratio beyond it is a bug upstream, seen in `ratio_max`.
_LOG_RATIO_BOUND = 20.0


def importance_ratio(new: Tensor, old: Tensor, mask: Tensor, kind: str = "token") -> Tensor:
    """How much likelier tokens became since the old policy, `[B, T]`.

    Args:
        new: `[B, T]` log-probs under the weights being trained.
        old: `[B, T]` log-probs before the iteration's first update.
        mask: `[B, T]`, 1 on sampled tokens.
        kind: `token`: exp(new - old), GRPO; `sequence`: the geometric mean over
            the trajectory, the same for all its tokens, GSPO (arXiv 2507.18071).
    """
    log_ratio = (new - old) * mask
    if kind == "sequence":
        log_ratio = (log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)).expand_as(new)
    return log_ratio.clamp(-_LOG_RATIO_BOUND, _LOG_RATIO_BOUND).exp()


def clipped_policy_loss(ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A), `[B, T]`; `advantage` is `[B]`.

    The asymmetric clip (0.2 / 0.27 in the paper) lets unlikely tokens gain
    more than likely ones may lose.
    """
    a = advantage[:, None]
    return -torch.minimum(ratio * a, ratio.clamp(1 - clip_low, 1 + clip_high) * a)


def low_variance_kl(new: Tensor, reference: Tensor) -> Tensor:
    """The k3 estimate of KL(new || reference) per token, `[B, T]`; never negative.

    exp(d) - d - 1 with d = reference - new (Schulman, "Approximating KL divergence").
    """
    d = (reference - new).clamp(-_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)
    return d.exp() - d - 1


def truncated_importance_weights(old: Tensor, engine: Tensor, cap: float) -> Tensor:
    """min(exp(old - engine), cap), `[B, T]`: corrects for sampling by slightly other weights.

    1 where the engine's log-prob is NaN (a turn that was not sampled).
    """
    return torch.nan_to_num(old - engine, nan=0.0).clamp(max=_LOG_RATIO_BOUND).exp().clamp(max=cap)


def loss_weights(lengths: Sequence[int], aggregation: str, fixed_length: int) -> list[float]:
    """Weights w such that the batch's loss is the sum over trajectories of w times the sum over tokens.

    They depend on the whole batch, so micro-batches and ranks simply add up.

    Args:
        lengths: Sampled tokens of each trajectory of the batch, all at least 1.
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
    raise ValueError(f"aggregation {aggregation!r} is not sequence_mean, token_mean or fixed_length")
