"""Gated delta rule in bfloat16 at the head widths of Qwen3.5, against float64."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vz_ray.learner.attention import Segment
from vz_ray.learner.gated_delta_rule import _kernel_agrees, gated_delta_rule

TOLERANCE = 2e-2
"""Largest relative difference (norm of the difference to norm of the value). One rounding to bfloat16 is 2e-3."""
WIDTH = 128


def make_inputs(tokens: int, heads: int) -> list[Tensor]:
    """Return query, key, value, decay and beta; states last for hundreds of tokens."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, n, WIDTH) for n in (heads, heads, 2 * heads)]
    gates = torch.randn(2, tokens, 2 * heads, generator=generator)
    inputs = [*(torch.randn(shape, generator=generator) for shape in shapes), F.logsigmoid(gates[0] + 5)]
    return [t.bfloat16() for t in (*inputs, gates[1].sigmoid())]


def run(inputs: list[Tensor], dtype: torch.dtype, device: torch.device, segments: list[Segment]) -> list[Tensor]:
    # The decay is never half precision; see `packed_linear_attention`.
    dtypes = [dtype, dtype, dtype, max(dtype, torch.float32, key=lambda d: d.itemsize), dtype]
    leaves = [t.to(device, d).requires_grad_() for t, d in zip(inputs, dtypes, strict=True)]
    out = gated_delta_rule(*leaves, segments)
    mix = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out)
    return [t.detach().double().cpu() for t in (out, *torch.autograd.grad((out * mix).sum(), leaves))]


def test_forked_states_match_float64(device: torch.device, record_property: Callable[[str, object], None]) -> None:
    """On a GPU, bfloat16 uses flash-linear-attention; on the CPU the portable form."""
    if device.type == "cuda":
        if find_spec("fla") is None:
            pytest.skip("flash-linear-attention is not installed")
        assert _kernel_agrees(device, torch.bfloat16, WIDTH, WIDTH), "the kernel is disabled; the log has the reason"
    heads, size = (16, 10) if device.type == "cuda" else (2, 1)
    bounds = [(0, 70, (0, 0)), (70, 90, (0, 70)), (90, 170, (0, 70)), (170, 190, (0, 0))]
    segments = [Segment(a * size, b * size, (c * size, d * size)) for a, b, (c, d) in bounds]
    inputs = make_inputs(segments[-1].end, heads)
    actual, expected = (run(inputs, dtype, device, segments) for dtype in (torch.bfloat16, torch.float64))
    names = ("output", "dQ", "dK", "dV", "dG", "dBeta")
    differences = {n: float((a - e).norm() / e.norm()) for n, a, e in zip(names, actual, expected, strict=True)}
    record_property("relative_differences", differences)
    assert max(differences.values()) <= TOLERANCE, differences
