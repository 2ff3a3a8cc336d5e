"""Packed attention at the shapes of real models, in half precision, against a dense mask in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.learner.test_attention import dense_mask
from vz_ray.learner import attention
from vz_ray.learner.attention import PackedLayout, Segment, packed_attention

TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
"""Largest relative difference (norm of the difference to norm of the value). One rounding to bfloat16 is 2e-3."""
GIB = 1 << 30


def make_inputs(heads: int, kv_heads: int, width: int, tokens: int, dtype: torch.dtype, device: torch.device) -> list:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, n, tokens, width) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def attend_rows(inputs: list[Tensor], rows: Tensor, mask: Tensor) -> list[Tensor]:
    """Return output `[rows, heads, d]` of some queries in float64, and the gradients of its sum with `mix`."""
    query, key, value = (t.detach().double().requires_grad_() for t in inputs)
    repeats = query.shape[1] // key.shape[1]
    keys, values = (t[0].repeat_interleave(repeats, dim=0) for t in (key, value))
    scores = query[0][:, rows] @ keys.mT * query.shape[-1] ** -0.5
    output = (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ values).transpose(0, 1)
    return [output.detach(), *torch.autograd.grad((output * mix(output)).sum(), (query, key, value))]


def mix(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=generator).to(output)


def relative_differences(actual: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    pairs = zip(("output", "dQ", "dK", "dV"), actual, expected, strict=True)
    return {name: float((a.double() - e).norm() / e.norm()) for name, a, e in pairs}


def run_packed(inputs: list[Tensor], rows: Tensor, layout: PackedLayout) -> list[Tensor]:
    out, _ = packed_attention(nn.Identity(), *inputs, None, scaling=inputs[0].shape[-1] ** -0.5, layout=layout)
    output = out[0, rows]
    return [output.detach(), *torch.autograd.grad((output * mix(output)).sum(), inputs)]


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(28, 4), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_match_a_float64_mask(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    width: int,
    record_property: Callable[[str, object], None],
) -> None:
    """On a GPU, bfloat16 uses FlashAttention and float32 the portable form."""
    if device.type == "cuda" and dtype is torch.bfloat16:
        assert attention._kernel_agrees(device, dtype, width), "FlashAttention is disabled; the log has the reason"
    size = 10 if device.type == "cuda" else 1
    bounds = [(0, 70, (0, 0)), (70, 90, (0, 70)), (90, 130, (0, 70)), (130, 150, (0, 0))]
    segments = [Segment(a * size, b * size, (c * size, d * size)) for a, b, (c, d) in bounds]
    tokens = segments[-1].end
    inputs, rows = make_inputs(heads, kv_heads, width, tokens, dtype, device), torch.arange(tokens, device=device)
    actual = run_packed(inputs, rows, PackedLayout.from_segments(segments, device))
    differences = relative_differences(actual, attend_rows(inputs, rows, dense_mask(segments).to(device)))
    record_property("relative_differences", differences)
    assert max(differences.values()) <= TOLERANCE[dtype], differences


def test_long_sequence_with_the_heads_of_a_7b_model(
    device: torch.device, record_property: Callable[[str, object], None]
) -> None:
    """32,768 tokens on a GPU: a prefix of 20,000 and three branches. The loss covers 64 queries of all segments."""
    prefix, branch = (20_000, 4_256) if device.type == "cuda" else (160, 32)
    segments = [Segment(0, prefix)]
    segments += [Segment(prefix + i * branch, prefix + (i + 1) * branch, (0, prefix)) for i in range(3)]
    tokens = segments[-1].end
    rows = torch.linspace(0, tokens - 1, 64).long().to(device)
    positions = torch.arange(tokens, device=device)
    starts = torch.tensor([s.start for s in segments], device=device)
    own_start = starts[torch.searchsorted(starts, rows, right=True) - 1]
    mask = (positions <= rows[:, None]) & ((positions < prefix) | (positions >= own_start[:, None]))
    inputs = make_inputs(28, 4, 128, tokens, torch.bfloat16, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    actual = run_packed(inputs, rows, PackedLayout.from_segments(segments, device))
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        record_property("peak_gib", peak / GIB)
        assert peak < 4 * GIB, "scores of a long sequence must never be stored"
    differences = relative_differences(actual, attend_rows(inputs, rows, mask))
    record_property("relative_differences", differences)
    assert max(differences.values()) <= TOLERANCE[torch.bfloat16], differences
