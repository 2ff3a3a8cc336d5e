"""Log-probs and entropy of given tokens without the whole `[tokens, vocab]` matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class TokenLogprobs(torch.autograd.Function):
    """`(hidden [N, H], weight [V, H], targets [N]) -> log-probs [N], entropy [N]`.

    Logits exist for `chunk` tokens at a time, in both directions: the backward
    pass makes them again and applies the closed form

        d logp_y / d z = 1[y] - p        d entropy / d z = -p (log p + entropy)

    rather than keeping any of them.
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
        logprobs = torch.empty(len(hidden), dtype=_wide(hidden), device=hidden.device)
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
            grad_weight = torch.zeros(weight.shape, dtype=_wide(hidden), device=weight.device)
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


def _wide(hidden: Tensor) -> torch.dtype:
    """What is summed in: float32, unless the model itself is wider."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: Tensor, banned: Tensor | None) -> Tensor:
    """`[n, H] -> [n, V]`, of the distribution that was sampled from."""
    logits = (hidden @ weight.t()).to(_wide(hidden)) / temperature[:, None]
    if banned is not None:
        logits = logits.masked_fill(banned, float("-inf"))
    return logits.log_softmax(dim=-1)


def _entropy(log_p: Tensor, p: Tensor) -> Tensor:
    # A banned token has p = 0 and log p = -inf; its term of the sum is 0.
    return -torch.where(p > 0, p * log_p, 0.0).sum(dim=-1)


class LogprobHead(nn.Module):
    """Takes the place of `lm_head`, over the same weight; gives log-probs rather than logits.

    It is a module of its own so that ZeRO-3 gathers the weight around its
    forward and backward passes.
    """

    def __init__(self, head: nn.Linear, chunk: int) -> None:
        super().__init__()
        self.weight = head.weight
        self.chunk = chunk

    def forward(
        self, hidden: Tensor, targets: Tensor, temperature: Tensor, banned: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of `targets [N]` given `hidden [N, H]`.

        Both are `[N]`, in float32, or in float64 if the model is.

        `temperature [N]` divides the logits; tokens where `banned [V]` is true have probability 0.
        """
        result: tuple[Tensor, Tensor] = TokenLogprobs.apply(
            hidden, self.weight, targets, temperature, banned, self.chunk
        )
        return result
