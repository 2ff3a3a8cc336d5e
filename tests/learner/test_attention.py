"""Packed attention against attention with a dense_mask mask, forward and backward."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from vz_ray.learner import attention
from vz_ray.learner.attention import PackedLayout, Segment, packed_attention

CPU = torch.device("cpu")
LAYOUTS = {
    "alone": [Segment(0, 9)],
    "packed": [Segment(0, 5), Segment(5, 6), Segment(6, 20)],
    "shared": [Segment(0, 7), Segment(7, 9, (0, 7)), Segment(9, 17, (0, 7)), Segment(17, 18, (0, 7))],
    "two trees": [
        Segment(0, 4), Segment(4, 9, (0, 4)), Segment(9, 10, (0, 4)),
        Segment(10, 13),
        Segment(13, 15), Segment(15, 19, (13, 15)), Segment(19, 30, (13, 15)),
    ],
}  # fmt: skip


def dense_mask(segments: list[Segment]) -> Tensor:
    """Return the attention mask `[T, T]` of these segments."""
    size = segments[-1].end
    mask = torch.zeros(size, size, dtype=torch.bool)
    for segment in segments:
        for token in range(segment.start, segment.end):
            mask[token, segment.prefix[0] : segment.prefix[1]] = True
            mask[token, segment.start : token + 1] = True
    return mask


def inputs(size: int, dtype: torch.dtype, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, n, size, 8) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=generator, dtype=dtype, requires_grad=True) for s in shapes]


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (key, value))
    scores = (query @ key.mT * 0.3).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def assert_same_attention(got: Tensor, expected: Tensor, tensors: list[Tensor], tolerance: float) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)
    mix = torch.randn(expected.shape, dtype=expected.dtype)
    mine = torch.autograd.grad((got * mix).sum(), tensors, retain_graph=True)
    theirs = torch.autograd.grad((expected * mix).sum(), tensors)
    for actual_grad, expected_grad in zip(mine, theirs, strict=True):
        torch.testing.assert_close(actual_grad, expected_grad, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_packed_attention_matches_the_dense_mask(name: str, dtype: torch.dtype, tolerance: float) -> None:
    segments = LAYOUTS[name]
    tensors = inputs(segments[-1].end, dtype)
    got, _ = packed_attention(
        nn.Identity(), *tensors, None, scaling=0.3, layout=PackedLayout.from_segments(segments, CPU)
    )
    assert_same_attention(got, dense_attention(*tensors, dense_mask(segments)), tensors, tolerance)


@pytest.mark.parametrize("name", LAYOUTS)
def test_portable_form_matches_the_dense_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form that float32 on a GPU uses, run on the CPU."""
    monkeypatch.setattr(attention, "_KERNELS", frozenset())
    segments = LAYOUTS[name]
    tensors = inputs(segments[-1].end, torch.float64)
    got, _ = packed_attention(
        nn.Identity(), *tensors, None, scaling=0.3, layout=PackedLayout.from_segments(segments, CPU)
    )
    assert_same_attention(got, dense_attention(*tensors, dense_mask(segments)), tensors, 1e-12)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_tensors_match_the_dense_mask(name: str) -> None:
    """Check the queries and gathered keys of each segment, with a causal mask aligned to the last key."""
    segments = LAYOUTS[name]
    layout, mask = PackedLayout.from_segments(segments, CPU), dense_mask(segments)
    keys = layout.key_index if layout.key_index is not None else torch.arange(segments[-1].end)
    max_q, max_k = 0, 0
    for s, segment in enumerate(segments):
        q0, q1, k0, k1 = (*layout.cu_seqlens_q[s : s + 2].tolist(), *layout.cu_seqlens_k[s : s + 2].tolist())
        assert (q0, q1) == (segment.start, segment.end)
        max_q, max_k = max(max_q, q1 - q0), max(max_k, k1 - k0)
        for i in range(q1 - q0):
            visible = keys[k0 : k1 - (q1 - q0) + i + 1]
            assert mask[q0 + i].nonzero().flatten().tolist() == visible.tolist()
    assert layout.max_seqlens == (max_q, max_k)
    assert len(keys) == layout.cu_seqlens_k[-1]


def reference_varlen_attn(aligned_to_end: bool):
    """Return an implementation of the documented `varlen_attn`: `[T, heads, d]`, causal."""

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert window_size == (-1, 0)
        assert enable_gqa == (q.shape[1] != k.shape[1])
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert (int(cu_q.diff().max()), int(cu_k.diff().max())) == (max_q, max_k)
        parts = []
        for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
            offset = (k1 - k0) - (q1 - q0) if aligned_to_end else 0
            mask = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(offset)
            qkv = (t[None].transpose(1, 2) for t in (q[q0:q1], k[k0:k1], v[k0:k1]))
            parts.append(masked_attention(*qkv, mask, scale)[0])
        return torch.cat(parts)

    return varlen_attn


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    return ((q @ k.mT * scale).masked_fill(~mask, float("-inf")).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("name", LAYOUTS)
def test_varlen_kernel_is_called_as_documented(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", reference_varlen_attn(aligned_to_end=True))
    segments = LAYOUTS[name]
    tensors = inputs(segments[-1].end, torch.float64)
    got = attention._varlen(*tensors, 0.3, PackedLayout.from_segments(segments, CPU))
    assert_same_attention(got, dense_attention(*tensors, dense_mask(segments)), tensors, 1e-12)


@pytest.mark.parametrize("aligned_to_end", [True, False])
def test_kernel_with_other_mask_alignment_is_rejected(
    aligned_to_end: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", reference_varlen_attn(aligned_to_end))
    attention._kernel_agrees.cache_clear()
    assert attention._kernel_agrees(CPU, torch.float32, 8) == aligned_to_end
    assert ("Disabling variable-length FlashAttention" in caplog.text) != aligned_to_end
    attention._kernel_agrees.cache_clear()
