"""Policy losses per token.

log-probs --importance_ratio--> ratio --POLICY_LOSSES[config.policy_loss]--> loss [B, S]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vz_ray.config.loss import LossConfig
from vz_ray.learner.kl import MAX_LOG_RATIO


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
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clipped_policy_loss(
    ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A), `[B, S]`.

    The asymmetric clip (0.2 / 0.27 in the paper) allows larger increases than decreases of a token's
    probability. The loss of a token with A < 0 grows without limit in r; the dual clip (arXiv 1912.09729) limits it
    to -c A.

    Args:
        ratio: `[B, S]`.
        advantage: `[B, S]` or `[B, 1]`.
        dual_clip: c, above 1; None disables the dual clip.
    """
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
    if dual_clip is None:
        return loss
    return torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)


def cispo_loss(logprobs: Tensor, ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-clip(r, 1 - low, 1 + high) A log p, `[B, S]`, with a constant clipped ratio (CISPO, arXiv 2506.13585).

    The gradient is -clip(r) A for every token. Unlike with a clipped surrogate, no token is left out. The paper sets
    no lower limit.

    Args:
        logprobs: `[B, S]`, with gradient.
        ratio: `[B, S]`; its gradient is not used.
        advantage: `[B, S]` or `[B, 1]`.
    """
    return -ratio.detach().clamp(1 - clip_low, 1 + clip_high) * advantage * logprobs


POLICY_LOSSES: Mapping[str, Callable[[Tensor, Tensor, Tensor, LossConfig], Tensor]] = {
    "clip": lambda logprobs, ratio, advantage, config: clipped_policy_loss(
        ratio, advantage, config.clip_ratio_low, config.clip_ratio_high, config.clip_ratio_c
    ),
    "cispo": lambda logprobs, ratio, advantage, config: cispo_loss(
        logprobs, ratio, advantage, config.clip_ratio_low, config.clip_ratio_high
    ),
}
"""Loss of each `policy_loss`, from log-probs, importance ratio and advantage."""
