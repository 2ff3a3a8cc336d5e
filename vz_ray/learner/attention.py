"""Attention in a packed sequence: each segment attends to itself causally and to its whole prefix.

    [prefix | branch 1 | branch 2 | ...]      branch 2 attends to the prefix and to itself

On GPUs in half precision this is one call of variable-length FlashAttention. The keys of each branch are the
prefix's keys followed by its own. The prefix's keys are copied once per branch (2 kB per token for a 7B
model); its queries, projections and MLPs are computed once. Otherwise the portable form computes the attention
to prefix and to self separately and joins them by log-sum-exps, for a bounded number of queries at a time.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from vz_ray.learner.kernel_check import kernel_failure
from vz_ray.learner.sequence_parallel import SequenceShard, gather_kv_tokens, gather_tokens, scatter_tokens

PACKED_ATTENTION = "packed"
"""Name of `packed_attention` in the registry of transformers."""

_MAX_SCORES = 1 << 27
"""Maximum number of attention scores that exist at a time in the portable form: 0.5 GiB in float32, twice that
in the backward pass."""

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
        shard: This rank's part of the T tokens; None if it has all.
    """

    segments: tuple[Segment, ...]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    key_index: Tensor | None
    shard: SequenceShard | None = None

    @classmethod
    def from_segments(
        cls, segments: Sequence[Segment], device: torch.device, shard: SequenceShard | None = None
    ) -> PackedLayout:
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
            shard=shard,
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> PackedLayout:
        """Return a copy with `function` applied to each tensor."""
        return PackedLayout(
            segments=self.segments,
            cu_seqlens_q=function(self.cu_seqlens_q),
            cu_seqlens_k=function(self.cu_seqlens_k),
            key_index=None if self.key_index is None else function(self.key_index),
            shard=self.shard,
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

    With `layout.shard`, inputs and output have this rank's tokens.

    Args:
        query: `[1, heads, T, d]`.
        key: `[1, kv heads, T, d]`; `value` has the same shape.
        attention_mask: Ignored; `layout` determines the attended tokens.

    Returns:
        `[1, T, heads, d]` and None (no attention weights).
    """
    if (shard := layout.shard) is None:
        return _attend_packed(query, key, value, scaling, layout), None
    query = gather_tokens(query[0].transpose(0, 1), shard).transpose(0, 1)[None]
    key, value = (gather_kv_tokens(t[0].transpose(0, 1), shard).transpose(0, 1)[None] for t in (key, value))
    return scatter_tokens(_attend_packed(query, key, value, scaling, layout)[0], shard)[None], None


def _attend_packed(query: Tensor, key: Tensor, value: Tensor, scaling: float, layout: PackedLayout) -> Tensor:
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.is_cuda and half and _kernel_agrees(query.device, query.dtype, query.shape[-1]):
        return _varlen(query, key, value, scaling, layout)
    return _portable(query, key, value, scaling, layout)


def _portable(query: Tensor, key: Tensor, value: Tensor, scaling: float, layout: PackedLayout) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
    return SegmentAttention.apply(query, key, value, scaling, layout).transpose(1, 2)


@lru_cache
def _kernel_agrees(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Compare output and gradients of the kernel with the portable form, once per device and dtype.

    A kernel that aligns its causal mask to the first key would silently train on the wrong context.
    """
    failure = _kernel_failure(device, dtype, width)
    if failure is not None:
        log.warning("Disabling variable-length FlashAttention for %s on %s: %s", dtype, device, failure)
    return failure is None


def _kernel_failure(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Return why the kernel cannot be used; None if it agrees with the portable form."""
    layout = PackedLayout.from_segments([Segment(0, 5), Segment(5, 8, (0, 5)), Segment(8, 9, (0, 5))], device)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, heads, 9, width, generator=generator).to(device, dtype) for heads in (4, 2, 2)]
    grad_output = torch.randn(1, 9, 4, width, generator=generator).to(device, dtype)

    def run(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *tensors: attention(*tensors, width**-0.5, layout)

    return kernel_failure(run(_varlen), run(_portable), inputs, grad_output, ("dQ", "dK", "dV"))


def _varlen(query: Tensor, key: Tensor, value: Tensor, scaling: float, layout: PackedLayout) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    if layout.key_index is not None:
        k, v = k.index_select(0, layout.key_index), v.index_select(0, layout.key_index)
    max_q, max_k = layout.max_seqlens
    options: dict[str, Any] = {}
    if (repeats := q.shape[1] // k.shape[1]) > 1:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:  # torch < 2.12
            k, v = (t.repeat_interleave(repeats, dim=1) for t in (k, v))
    # The causal mask is aligned to the last key: a branch's first token attends to the whole prefix.
    out = varlen_attn(
        q, k, v, layout.cu_seqlens_q, layout.cu_seqlens_k, max_q, max_k,
        scale=scaling, window_size=(-1, 0), **options,
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
            query.new_empty(query.shape[:-1], dtype=accumulation_dtype(query.dtype)),
        )
        for q, k, causal, is_first in _parts(layout, query):
            part, part_lse = _attend(query[:, :, q], key[:, :, k], value[:, :, k], causal, scaling)
            if is_first:
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
        dq, dk, dv = (torch.zeros_like(t, dtype=accumulation_dtype(t.dtype)) for t in (query, key, value))
        for q, k, causal, _ in _parts(ctx.layout, query):
            part = _attend_backward(
                grad[:, :, q], query[:, :, q], key[:, :, k], value[:, :, k],
                out[:, :, q], lse[:, :, q], causal, ctx.scaling,
            )  # fmt: skip
            for total, positions, term in zip((dq, dk, dv), (q, k, k), part, strict=True):
                total[:, :, positions] += term
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), None, None


def _parts(layout: PackedLayout, query: Tensor) -> Iterator[tuple[slice, slice, bool, bool]]:
    """Yield query range, key range, whether causal, and whether these are the first keys of the queries.

    Causal ranges end at the same token. Without a kernel, a part has at most `_MAX_SCORES` scores.
    """
    for segment in layout.segments:
        for q in _query_chunks(segment.start, segment.end, segment.end - segment.start, query):
            yield q, slice(segment.start, q.stop), True, True
    for (start, end), queries in layout.prefix_groups():
        for q in _query_chunks(queries.start, queries.stop, end - start, query):
            yield q, slice(start, end), False, False


def _query_chunks(start: int, end: int, num_keys: int, query: Tensor) -> Iterator[slice]:
    """Split the queries `start..end`, which have up to `num_keys` keys."""
    size = end - start
    if query.device.type not in _KERNELS:
        size = max(1, _MAX_SCORES // (query.shape[1] * num_keys))
    for first in range(start, end, size):
        yield slice(first, min(first + size, end))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: float64 for float64, otherwise float32."""
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
    return (scores.sub_(lse[..., None]).exp_() @ v.to(scores.dtype)).to(q.dtype), lse


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scaling: float
) -> tuple[Tensor, ...]:
    if q.device.type in _KERNELS:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scaling
        )
    dtype = accumulation_dtype(q.dtype)
    p = _scores(q, k, causal, scaling).sub_(lse[..., None]).exp_()
    grad, q, k, v, out = (t.to(dtype) for t in (grad, q, k, v, out))
    dv = p.mT @ grad
    ds = p.mul_((grad @ v.mT).sub_((grad * out).sum(-1, keepdim=True))).mul_(scaling)
    return ds @ k, ds.mT @ q, dv


def _scores(q: Tensor, k: Tensor, causal: bool, scaling: float) -> Tensor:
    """Return `[1, heads, Q, K]`; a causal mask is aligned to the last key."""
    dtype = accumulation_dtype(q.dtype)
    scores = (q.to(dtype) @ k.to(dtype).mT).mul_(scaling)
    if causal:
        num_queries, num_keys = scores.shape[-2:]
        future = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).triu(1 + num_keys - num_queries)
        scores.masked_fill_(future, float("-inf"))
    return scores
