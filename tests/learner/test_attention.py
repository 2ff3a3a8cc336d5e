"""Packed attention against attention with a dense_mask mask, forward and backward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import AuxRequest, varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

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


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("max_scores", [1, 60, 200])
@pytest.mark.parametrize("name", LAYOUTS)
def test_query_chunks_do_not_change_the_result(name: str, max_scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_KERNELS", frozenset())
    monkeypatch.setattr(attention, "_MAX_SCORES", max_scores)
    segments = LAYOUTS[name]
    tensors = inputs(segments[-1].end, torch.float64)
    got = attention._portable(*tensors, 0.3, PackedLayout.from_segments(segments, CPU))
    assert_same_attention(got, dense_attention(*tensors, dense_mask(segments)), tensors, 1e-12)


def test_query_chunks_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = [Segment(0, 200), Segment(200, 300, (0, 200)), Segment(300, 400, (0, 200))]
    layout, tensors = PackedLayout.from_segments(segments, CPU), inputs(400, torch.float32)
    monkeypatch.setattr(attention, "_KERNELS", frozenset())

    def largest(max_scores: int) -> int:
        monkeypatch.setattr(attention, "_MAX_SCORES", max_scores)
        with LargestTensor() as recorded:
            attention._portable(*tensors, 0.3, layout).sum().backward()
        return recorded.numel

    assert largest(1 << 27) == 4 * 200 * 200
    assert largest(20_000) <= 20_000


def reference_kernel(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float, aligned_to_end: bool
) -> Tensor:
    """Compute causal attention of `[T, heads, d]` by segment."""
    parts = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        offset = (k1 - k0) - (q1 - q0) if aligned_to_end else 0
        mask = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(offset)
        qkv = (t[None].transpose(1, 2) for t in (query[q0:q1], key[k0:k1], value[k0:k1]))
        parts.append(masked_attention(*qkv, mask, scale)[0])
    return torch.cat(parts)


def varlen_attn_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: AuxRequest | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """The signature of torch 2.11 (torch/nn/attention/varlen.py), which has no grouped queries."""
    assert query.shape[1] == key.shape[1] == value.shape[1]
    return check_and_attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def varlen_attn_2_13(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: AuxRequest | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """The signature of torch 2.13."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert cu_seq_k is not None
    return check_and_attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def check_and_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
    window_size: tuple[int, int],
) -> Tensor:
    assert scale is not None
    assert window_size == (-1, 0)
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (int(cu_q.diff().max()), int(cu_k.diff().max())) == (max_q, max_k)
    return reference_kernel(query, key, value, cu_q, cu_k, scale, aligned_to_end=True)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    return ((q @ k.mT * scale).masked_fill(~mask, float("-inf")).softmax(-1) @ v).transpose(1, 2)


def test_recorded_signature_is_that_of_the_installed_torch() -> None:
    recorded, installed = (
        [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
        for function in (varlen_attn_2_13, varlen_attn)
    )
    assert recorded == installed


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("kernel", [varlen_attn_2_11, varlen_attn_2_13])
@pytest.mark.parametrize("name", LAYOUTS)
def test_varlen_kernel_is_called_as_documented(
    name: str, kernel: Callable[..., Tensor], kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    segments = LAYOUTS[name]
    tensors = inputs(segments[-1].end, torch.float64, kv_heads=kv_heads)
    got = attention._varlen(*tensors, 0.3, PackedLayout.from_segments(segments, CPU))
    assert_same_attention(got, dense_attention(*tensors, dense_mask(segments)), tensors, 1e-12)


def aligned_to_start(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *_: int, **options: Any) -> Tensor:
    return reference_kernel(q, k, v, cu_q, cu_k, options["scale"], aligned_to_end=False)


def with_wrong_gradient(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
    return varlen_attn_2_11(q, k.detach(), v, *args, **options) + 0.0 * k.sum()


def with_nan(*args: Any, **options: Any) -> Tensor:
    return varlen_attn_2_11(*args, **options) * float("nan")


def without_window(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *_: int, scale: float) -> Tensor:
    raise AssertionError("the call does not match the signature")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (varlen_attn_2_11, ""),
        (varlen_attn_2_13, ""),
        (aligned_to_start, "output differs by"),
        (with_wrong_gradient, "dK differs by"),
        (with_nan, "output differs by nan"),
        (without_window, "TypeError"),
    ],
)
def test_kernel_with_other_results_is_rejected(
    kernel: Callable[..., Tensor], reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    attention._kernel_agrees.cache_clear()
    with torch.no_grad():
        assert attention._kernel_agrees(CPU, torch.float32, 8) == (not reason)
    attention._kernel_agrees.cache_clear()
    assert ("Disabling variable-length FlashAttention" in caplog.text) == bool(reason)
    assert reason in caplog.text


def test_kernel_check_works_inside_gradient_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check runs in the first forward pass only, and recomputation must save the same tensors."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn_2_11)
    attention._kernel_agrees.cache_clear()
    segments = LAYOUTS["shared"]
    layout, tensors = PackedLayout.from_segments(segments, CPU), inputs(segments[-1].end, torch.float64)

    def layer(*qkv: Tensor) -> Tensor:
        assert attention._kernel_agrees(CPU, torch.float32, 8)
        return attention._varlen(*qkv, 0.3, layout)

    got = checkpoint(layer, *tensors, use_reentrant=False)
    attention._kernel_agrees.cache_clear()
    monkeypatch.setattr(attention, "_kernel_agrees", lambda *_: True)
    assert_same_attention(got, dense_attention(*tensors, dense_mask(segments)), tensors, 1e-12)
