"""Log-probs and entropies of target tokens without the whole `[tokens, vocab]` matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class TokenLogprobs(torch.autograd.Function):
    """`(hidden [N, H], weight [V, H], targets [N]) -> log-probs [N], entropy [N]`.

    Logits exist for `chunk` tokens at a time. The backward pass recomputes them and applies the closed form

        d logp_y / d z = 1[y] - p        d entropy / d z = -p (log p + entropy)
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: Tensor,
        banned: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(hidden), dtype=_accumulation_dtype(hidden), device=hidden.device)
        entropy = torch.empty_like(logprobs)
        for part in _parts(len(hidden), chunk):
            log_p = _log_softmax(hidden[part], weight, temperature[part], banned)
            logprobs[part] = log_p.gather(1, targets[part, None]).squeeze(1)
            entropy[part] = _entropy(log_p, log_p.exp())
        ctx.save_for_backward(hidden, weight, targets, temperature, banned, entropy)
        ctx.chunk = chunk
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropy = grads
        hidden, weight, targets, temperature, banned, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros(weight.shape, dtype=_accumulation_dtype(hidden), device=weight.device)
        for part in _parts(len(hidden), ctx.chunk):
            log_p = _log_softmax(hidden[part], weight, temperature[part], banned)
            p = log_p.exp()
            finite = log_p if banned is None else log_p.masked_fill(banned, 0.0)
            grad = finite.add(entropy[part, None]).mul_(grad_entropy[part, None])
            grad = grad.add_(grad_logprobs[part, None]).mul_(p).neg_()
            grad.scatter_add_(1, targets[part, None], grad_logprobs[part, None])
            grad = grad.div_(temperature[part, None]).to(hidden.dtype)
            grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden[part]
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
            None,
            None,
            None,
        )


def _parts(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]


def _accumulation_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of sums: float32, or float64 for a float64 model."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: Tensor, banned: Tensor | None) -> Tensor:
    """Log-probs of the sampling distribution, `[n, H] -> [n, V]`."""
    logits = (hidden @ weight.t()).to(_accumulation_dtype(hidden)) / temperature[:, None]
    if banned is not None:
        logits = logits.masked_fill(banned, float("-inf"))
    return logits.log_softmax(dim=-1)


def _entropy(log_p: Tensor, p: Tensor) -> Tensor:
    # A banned token has p = 0 and log p = -inf; its term is 0.
    return -torch.where(p > 0, p * log_p, 0.0).sum(dim=-1)


class LogprobHead(nn.Module):
    """Replacement of `lm_head` with the same weight that returns log-probs instead of logits.

    As a separate module, ZeRO-3 gathers the weight for its forward and backward passes only.
    """

    def __init__(self, head: nn.Linear, chunk: int) -> None:
        super().__init__()
        self.weight = head.weight
        self.chunk = chunk

    def forward(
        self, hidden: Tensor, targets: Tensor, temperature: Tensor, banned: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return log-probs and entropies of `targets [N]` given `hidden [N, H]`.

        Both are `[N]` in float32, or in float64 for a float64 model.

        Args:
            temperature: `[N]`, divides the logits.
            banned: `[V]`, True for tokens of probability 0.
        """
        return TokenLogprobs.apply(hidden, self.weight, targets, temperature, banned, self.chunk)
