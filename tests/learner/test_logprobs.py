"""Chunked log-probs against a dense softmax."""

from __future__ import annotations

import pytest
import torch

from vz_ray.learner.logprobs import TokenLogprobs


def inputs(device: torch.device) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=g).to(device).requires_grad_() for n in (11, 13))
    targets = torch.randint(3, 13, (11,), generator=g).to(device)
    temperature = torch.tensor([1.0, 0.7] * 5 + [1.3], device=device)
    return hidden, weight, targets, temperature


def dense_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    banned: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = (hidden @ weight.t()) / temperature[:, None]
    logits = logits.masked_fill(banned, float("-inf"))
    distribution = torch.distributions.Categorical(logits=logits)
    return distribution.log_prob(targets), distribution.entropy()


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("ban", [False, True])
def test_values_and_gradients_match_dense_softmax(device: torch.device, chunk: int, ban: bool) -> None:
    hidden, weight, targets, temperature = inputs(device)
    banned = torch.zeros(13, dtype=torch.bool, device=device)
    banned[:2] = ban
    mix = torch.linspace(-1, 2, 11, device=device)
    ours = TokenLogprobs.apply(hidden, weight, targets, temperature, banned if ban else None, chunk)
    (ours[0] * mix - 0.3 * ours[1] * mix).sum().backward()
    got = [hidden.grad, weight.grad]
    hidden.grad = weight.grad = None
    theirs = dense_logprobs(hidden, weight, targets, temperature, banned)
    (theirs[0] * mix - 0.3 * theirs[1] * mix).sum().backward()
    for actual, expected in zip((*ours, *got), (*theirs, hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_empty_input_gives_zero_gradients() -> None:
    hidden = torch.zeros(0, 6, requires_grad=True)
    weight = torch.randn(13, 6, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.long)
    logprobs, entropy = TokenLogprobs.apply(hidden, weight, empty, torch.ones(0), None, 4)
    (logprobs.sum() + entropy.sum()).backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() == 0
