"""Attention in a packed sequence: each segment attends to itself causally and to its whole prefix.

    [prefix | branch 1 | branch 2 | ...]      branch 2 attends to the prefix and to itself

On GPUs in half precision this is one call of variable-length FlashAttention. The keys of each branch are the
prefix's keys followed by its own. The prefix's keys are copied once per branch (2 kB per token for a 7B
model); its queries, projections and MLPs are computed once. On other devices the attention to prefix and to
self is computed separately and joined by log-sum-exps, without a mask or copies.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

PACKED_ATTENTION = "packed"
"""Name of `packed_attention` in the registry of transformers."""

_KERNEL_TOLERANCE = 0.05
"""Maximum difference between kernel and portable attention on unit-normal values in half precision."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `start..end`, which also attend to the tokens `prefix[0]..prefix[1]`; empty range: no prefix."""

    start: int
    end: int
    prefix: tuple[int, int] = (0, 0)

    @property
    def num_keys(self) -> int:
        """Number of keys of the last token."""
        return self.prefix[1] - self.prefix[0] + self.end - self.start


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Segments of a packed sequence of T tokens, in order and without gaps.

    Attributes:
        segments: S segments.
        cu_seqlens_q: `[S + 1]` int32, start of each segment's queries.
        cu_seqlens_k: `[S + 1]` int32, start of each segment's keys after gathering by `key_index`.
        key_index: Positions of all segments' keys, segment by segment; None if no segment has a prefix.
    """

    segments: tuple[Segment, ...]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    key_index: Tensor | None

    @classmethod
    def from_segments(cls, segments: Sequence[Segment], device: torch.device) -> PackedLayout:
        """Build the index tensors of these segments on `device`."""
        lengths = torch.tensor([0, *(s.end - s.start for s in segments)])
        key_counts = torch.tensor([0, *(s.num_keys for s in segments)])
        positions = [torch.arange(*span) for s in segments for span in (s.prefix, (s.start, s.end))]
        has_prefix = any(s.prefix[1] > s.prefix[0] for s in segments)
        return cls(
            segments=tuple(segments),
            cu_seqlens_q=lengths.cumsum(0).int().to(device),
            cu_seqlens_k=key_counts.cumsum(0).int().to(device),
            key_index=torch.cat(positions).to(device) if has_prefix else None,
        )

    @property
    def max_seqlens(self) -> tuple[int, int]:
        """Maximum number of queries and of keys per segment."""
        return max(s.end - s.start for s in self.segments), max(s.num_keys for s in self.segments)

    def prefix_groups(self) -> Iterator[tuple[tuple[int, int], slice]]:
        """Yield each non-empty prefix and the range of tokens that attend to it."""
        for prefix, segments in groupby(self.segments, key=lambda s: s.prefix):
            members = list(segments)
            if prefix[1] > prefix[0]:
                yield prefix, slice(members[0].start, members[-1].end)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layout: PackedLayout,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Compute attention of one packed sequence; signature of an attention function of transformers.

    Args:
        query: `[1, heads, T, d]`.
        key: `[1, kv heads, T, d]`; `value` has the same shape.
        attention_mask: Ignored; `layout` determines the attended tokens.

    Returns:
        `[1, T, heads, d]` and None (no attention weights).
    """
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.is_cuda and half and _kernel_agrees(query.device, query.dtype, query.shape[-1]):
        return _varlen(query, key, value, scaling, layout), None
    return _portable(query, key, value, scaling, layout), None


def _portable(query: Tensor, key: Tensor, value: Tensor, scaling: float, layout: PackedLayout) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
    out: Tensor = SegmentAttention.apply(query, key, value, scaling, layout)
    return out.transpose(1, 2)


@lru_cache
def _kernel_agrees(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Compare the kernel with the portable form once per device and dtype.

    A kernel that aligns its causal mask to the first key would silently train on the wrong context.
    """
    layout = PackedLayout.from_segments([Segment(0, 5), Segment(5, 8, (0, 5)), Segment(8, 9, (0, 5))], device)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, 9, width) for heads in (4, 2, 2)]
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    with torch.no_grad():
        difference = _varlen(q, k, v, width**-0.5, layout) - _portable(q, k, v, width**-0.5, layout)
    max_diff = float(difference.abs().max())
    if max_diff < _KERNEL_TOLERANCE:
        return True
    log.warning("Disabling variable-length FlashAttention: it differs by %.2g from the portable form", max_diff)
    return False


def _varlen(query: Tensor, key: Tensor, value: Tensor, scaling: float, layout: PackedLayout) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    if layout.key_index is not None:
        k, v = k.index_select(0, layout.key_index), v.index_select(0, layout.key_index)
    max_q, max_k = layout.max_seqlens
    # The causal mask is aligned to the last key: a branch's first token attends to the whole prefix.
    out = varlen_attn(
        q, k, v, layout.cu_seqlens_q, layout.cu_seqlens_k, max_q, max_k,
        scale=scaling, window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out[None]


class SegmentAttention(torch.autograd.Function):
    """Query, key, value `[1, heads, T, d]` -> output `[1, heads, T, d]`; any floating dtype, any device.

    Let o1, o2 be the attention outputs for two sets of keys and l1, l2 the logarithms of the softmax
    denominators. The output for both sets is

        l = logaddexp(l1, l2)        o = exp(l1 - l) o1 + exp(l2 - l) o2

    The gradient of each set is computed with o and l instead of its own output and log-sum-exp, as in ring
    attention (arXiv 2310.01889).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, layout: PackedLayout) -> Tensor:
        out, lse = (
            torch.empty_like(query),
            query.new_empty(query.shape[:-1], dtype=_accumulation_dtype(query.dtype)),
        )
        for q, k, causal, first in _parts(layout):
            part, part_lse = _attend(query[:, :, q], key[:, :, k], value[:, :, k], causal, scaling)
            if first:
                out[:, :, q], lse[:, :, q] = part, part_lse
                continue
            joint_lse = torch.logaddexp(lse[:, :, q], part_lse)
            weight = (lse[:, :, q] - joint_lse).exp()[..., None]
            part_weight = (part_lse - joint_lse).exp()[..., None]
            out[:, :, q] = (weight * out[:, :, q] + part_weight * part).to(out.dtype)
            lse[:, :, q] = joint_lse
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scaling, ctx.layout = scaling, layout
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grad = grads[0]
        dq, dk, dv = (torch.zeros_like(t) for t in (query, key, value))
        for q, k, causal, _ in _parts(ctx.layout):
            part = _attend_backward(
                grad[:, :, q], query[:, :, q], key[:, :, k], value[:, :, k],
                out[:, :, q], lse[:, :, q], causal, ctx.scaling,
            )  # fmt: skip
            for total, positions, term in zip((dq, dk, dv), (q, k, k), part, strict=True):
                total[:, :, positions] += term
        return dq, dk, dv, None, None


def _parts(layout: PackedLayout) -> Iterator[tuple[slice, slice, bool, bool]]:
    """Yield query range, key range, whether causal, and whether these are the first keys of the queries."""
    for segment in layout.segments:
        own = slice(segment.start, segment.end)
        yield own, own, True, True
    for (start, end), queries in layout.prefix_groups():
        yield queries, slice(start, end), False, False


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


_KERNELS = frozenset({"cpu"})
"""Devices with kernels that return log-sum-exps and accept them in the backward pass."""


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    """Return output `[1, heads, Q, d]` and log-sum-exp `[1, heads, Q]`."""
    if q.device.type in _KERNELS:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scaling)
        return out, lse
    scores = _scores(q, k, causal, scaling)
    lse = scores.logsumexp(dim=-1)
    return ((scores - lse[..., None]).exp() @ v.to(scores.dtype)).to(q.dtype), lse


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scaling: float
) -> tuple[Tensor, ...]:
    if q.device.type in _KERNELS:
        grads: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scaling
        )
        return grads
    dtype = _accumulation_dtype(q.dtype)
    p = (_scores(q, k, causal, scaling) - lse[..., None]).exp()
    grad, q, k, v, out = (t.to(dtype) for t in (grad, q, k, v, out))
    ds = p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * scaling
    return ds @ k, ds.mT @ q, p.mT @ grad


def _scores(q: Tensor, k: Tensor, causal: bool, scaling: float) -> Tensor:
    scores = (q @ k.mT).to(_accumulation_dtype(q.dtype)) * scaling
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores
