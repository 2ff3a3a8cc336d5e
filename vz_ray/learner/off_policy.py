"""Corrections for the difference between the engine, which sampled the tokens, and the learner's old policy.

    log(old / engine) --LOG_RATIOS[level]--> per token, or per trajectory
    truncated_importance_weights     min(ratio, cap): weights the policy loss
    rejection_mask                   low <= ratio <= high: leaves tokens out of the loss

The difference has two causes: other kernels with the same weights, and weights of an earlier version (staleness).
Tokens without an engine log-prob (NaN, in external turns) count as equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vz_ray.learner.kl import MAX_LOG_RATIO

LOG_RATIOS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token": lambda log_ratio, compared: log_ratio,
    "sequence": lambda log_ratio, compared: (log_ratio * compared).sum(-1, keepdim=True),
    "geometric": lambda log_ratio, compared: (
        (log_ratio * compared).sum(-1, keepdim=True) / compared.sum(-1, keepdim=True).clamp(min=1)
    ),
}
"""Log-ratio `[B, S]` or `[B, 1]` of each level, from the tokens' log-ratios and the mask of compared tokens.

`sequence` is that of the trajectory's probability, `geometric` its mean per token.
"""


def _ratio(old: Tensor, engine: Tensor, mask: Tensor, level: str) -> Tensor:
    """Return the ratio of old to engine probability, `[B, S]` or `[B, 1]`, at most exp(20)."""
    log_ratio = LOG_RATIOS[level](torch.nan_to_num(old - engine, nan=0.0), mask * ~engine.isnan())
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def truncated_importance_weights(old: Tensor, engine: Tensor, cap: float, mask: Tensor, level: str = "token") -> Tensor:
    """Return min(ratio, cap), `[B, S]`, or `[B, 1]` for `sequence`.

    Token weights (Yao et al., "On the Rollout-Training Mismatch in Modern RL Systems") have a low variance and are
    biased for long trajectories; sequence weights (Liu et al., "When Speed Kills Stability") are the reverse.

    Args:
        old: `[B, S]` log-probs of the learner before the first update of the step.
        engine: `[B, S]` log-probs of the engine, NaN in external turns.
        cap: Maximum weight.
        mask: `[B, S]`, 1 on sampled tokens.
        level: `token` or `sequence`.
    """
    return _ratio(old, engine, mask, level).clamp(max=cap)


def rejection_mask(old: Tensor, engine: Tensor, mask: Tensor, level: str, band: tuple[float, float]) -> Tensor:
    """Return which tokens are kept, boolean `[B, S]`, or `[B, 1]` for a level of trajectories.

    `token` is the mask of IcePop (Zhao et al., 2025). `sequence` and `geometric` leave out whole trajectories, as
    verl's rollout correction does. A product grows with the length, so that `sequence` rejects long trajectories
    first; `geometric` does not depend on the length.

    Args:
        old: As in `truncated_importance_weights`, like `engine` and `mask`.
        level: `token`, `sequence` or `geometric`.
        band: Minimum and maximum ratio.
    """
    ratio = _ratio(old, engine, mask, level)
    return (ratio >= band[0]) & (ratio <= band[1])
