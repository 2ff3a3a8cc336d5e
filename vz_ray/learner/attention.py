"""Attention within a packed sequence: each segment sees itself causally, and all of its prefix.

    [prefix | branch 1 | branch 2 | ...]      branch 2 looks at the prefix and at itself

On GPUs in half precision it is one call of FlashAttention for sequences of unequal length, in which each
branch's keys are the prefix's followed by its own; there the prefix's keys are copied once per branch (2 kB a
token for a 7B model), its queries, projections and MLPs are not. Elsewhere the two parts, prefix and self,
are attended to apart and joined by their log-sum-exps, so that no mask is made and nothing is copied.
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
"""The name under which transformers knows `packed_attention`."""


_SAME = 0.05
"""Largest difference of two forms of attention to unit-normal values in half precision."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `start..end`, which also see `prefix[0]..prefix[1]`, all of it; no prefix is an empty range."""

    start: int
    end: int
    prefix: tuple[int, int] = (0, 0)

    @property
    def num_keys(self) -> int:
        """Keys of its last token."""
        return self.prefix[1] - self.prefix[0] + self.end - self.start


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """The segments of a packed sequence of T tokens, in order and without gaps.

    Attributes:
        segments: S of them.
        cu_seqlens_q: `[S + 1]` int32, where each segment's queries begin.
        cu_seqlens_k: `[S + 1]` int32, where each segment's keys begin among those gathered.
        key_index: The places of all segments' keys, one segment after the other; None where they are the sequence.
    """

    segments: tuple[Segment, ...]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    key_index: Tensor | None

    @classmethod
    def from_segments(cls, segments: Sequence[Segment], device: torch.device) -> PackedLayout:
        """Tables of these segments, on `device`."""
        lengths = torch.tensor([0, *(s.end - s.start for s in segments)])
        sees = torch.tensor([0, *(s.num_keys for s in segments)])
        places = [torch.arange(*span) for s in segments for span in (s.prefix, (s.start, s.end))]
        shared = any(s.prefix[1] > s.prefix[0] for s in segments)
        return cls(
            segments=tuple(segments),
            cu_seqlens_q=lengths.cumsum(0).int().to(device),
            cu_seqlens_k=sees.cumsum(0).int().to(device),
            key_index=torch.cat(places).to(device) if shared else None,
        )

    @property
    def max_seqlens(self) -> tuple[int, int]:
        """Most queries, and most keys, of a segment."""
        return max(s.end - s.start for s in self.segments), max(s.num_keys for s in self.segments)

    def prefix_groups(self) -> Iterator[tuple[tuple[int, int], slice]]:
        """Prefixes that are not empty, and the run of tokens that see each."""
        for prefix, family in groupby(self.segments, key=lambda s: s.prefix):
            members = list(family)
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
    """Attention of one packed sequence, in the form that transformers calls.

    Args:
        query: `[1, heads, T, d]`.
        key: `[1, kv heads, T, d]`, as is `value`.
        attention_mask: Not used: `layout` says who sees whom.

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
    """Whether the kernel sees what a layout says, tried once: one that aligns its mask to the first key
    would train on the wrong context without a word.
    """
    layout = PackedLayout.from_segments([Segment(0, 5), Segment(5, 8, (0, 5)), Segment(8, 9, (0, 5))], device)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, 9, width) for heads in (4, 2, 2)]
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    with torch.no_grad():
        gap = (_varlen(q, k, v, width**-0.5, layout) - _portable(q, k, v, width**-0.5, layout)).abs().max()
    if gap < _SAME:
        return True
    log.warning("FlashAttention for unequal lengths is off by %.2g here: the slower form is used", float(gap))
    return False


def _varlen(query: Tensor, key: Tensor, value: Tensor, scaling: float, layout: PackedLayout) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    if layout.key_index is not None:
        k, v = k.index_select(0, layout.key_index), v.index_select(0, layout.key_index)
    most_q, most_k = layout.max_seqlens
    # Its causal mask is aligned to the end of the keys: a branch's first token sees all of the prefix.
    out = varlen_attn(
        q, k, v, layout.cu_seqlens_q, layout.cu_seqlens_k, most_q, most_k,
        scale=scaling, window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out[None]


class SegmentAttention(torch.autograd.Function):
    """`[1, heads, T, d]` query, key, value -> `[1, heads, T, d]`; any floating type, any device.

    With o1, o2 the attention to the keys of two sets and l1, l2 the logarithms of their softmax's
    denominators, attention to both together is

        l = logaddexp(l1, l2)        o = exp(l1 - l) o1 + exp(l2 - l) o2

    and its gradient is that of each part, computed with o and l in place of the part's own (as in ring
    attention, arXiv 2310.01889).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, layout: PackedLayout
    ) -> Tensor:
        out, lse = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=_wide(query.dtype))
        for q, k, causal, first in _parts(layout):
            part, its = _attend(query[:, :, q], key[:, :, k], value[:, :, k], causal, scaling)
            if first:
                out[:, :, q], lse[:, :, q] = part, its
                continue
            both = torch.logaddexp(lse[:, :, q], its)
            mine, theirs = (lse[:, :, q] - both).exp()[..., None], (its - both).exp()[..., None]
            out[:, :, q] = (mine * out[:, :, q] + theirs * part).to(out.dtype)
            lse[:, :, q] = both
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
            for total, places, term in zip((dq, dk, dv), (q, k, k), part, strict=True):
                total[:, :, places] += term
        return dq, dk, dv, None, None


def _parts(layout: PackedLayout) -> Iterator[tuple[slice, slice, bool, bool]]:
    """Queries, keys, whether causal, whether it is the first that these queries see."""
    for segment in layout.segments:
        own = slice(segment.start, segment.end)
        yield own, own, True, True
    for (start, end), family in layout.prefix_groups():
        yield family, slice(start, end), False, False


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


_KERNELS = frozenset({"cpu"})
"""Devices whose own kernels give log-sum-exps, and take them in the backward pass."""


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, `[1, heads, Q, d]` and `[1, heads, Q]`."""
    if q.device.type in _KERNELS:
        part, its = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=scaling
        )
        return part, its
    scores = _scores(q, k, causal, scaling)
    its = scores.logsumexp(dim=-1)
    return ((scores - its[..., None]).exp() @ v.to(scores.dtype)).to(q.dtype), its


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scaling: float
) -> tuple[Tensor, ...]:
    if q.device.type in _KERNELS:
        found: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scaling
        )
        return found
    wide = _wide(q.dtype)
    p = (_scores(q, k, causal, scaling) - lse[..., None]).exp()
    grad, q, k, v, out = (t.to(wide) for t in (grad, q, k, v, out))
    ds = p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * scaling
    return ds @ k, ds.mT @ q, p.mT @ grad


def _scores(q: Tensor, k: Tensor, causal: bool, scaling: float) -> Tensor:
    scores = (q @ k.mT).to(_wide(q.dtype)) * scaling
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores
