"""Comparison of an optional kernel with its portable form, before the kernel is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TOLERANCE = 0.05
"""Maximum difference on unit-normal values in half precision, relative to the largest value if that is above 1."""


def kernel_failure(
    kernel: Callable[..., Tensor],
    portable: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    grad_output: Tensor,
    names: Sequence[str],
) -> str | None:
    """Return why the kernel cannot be used; None if output and gradients agree with the portable form.

    Args:
        inputs: Arguments of both functions.
        grad_output: Gradient of their output.
        names: A name for the gradient of each input.
    """

    leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_output)]

    # The hooks hide this computation from gradient checkpointing, which does not repeat it.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        try:
            results = run(kernel)
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        expected_results = run(portable)
    for name, actual, expected in zip(("output", *names), results, expected_results, strict=True):
        max_diff = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1))
        if not max_diff < TOLERANCE:  # true also for NaN
            return f"{name} differs by {max_diff:.2g} from the portable form"
    return None
