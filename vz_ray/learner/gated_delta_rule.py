"""Gated delta rule over the segments of a packed sequence.

Each head holds a state S, `[key width, value width]`. Token t decays it, corrects the value stored under its key, and
reads it with its query:

    S = exp(g_t) S        S = S + k_t (beta_t (v_t - S^T k_t))^T        o_t = S^T q_t

A segment starts with S = 0, or with the last state of its prefix. A prefix is computed once; its state is forked:

    prefix ---> S ---> branch 1
                 +---> branch 2        dS = sum of the branches' gradients

The portable form computes chunks of 64 tokens by matrix products (arXiv 2412.06464). The part that needs no state is
one batch of all chunks of all segments. The scan over chunks is one batch of all segments that still have chunks. On
GPUs in half precision the kernel of flash-linear-attention computes prefixes and branches in one call each.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from vz_ray.learner.attention import Segment, accumulation_dtype
from vz_ray.learner.kernel_check import kernel_failure

CHUNK = 64
"""Tokens per chunk; a segment is padded to a multiple."""
_EPSILON = 1e-6
"""Added to the squared norm of queries and keys, as in transformers and flash-linear-attention."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Level:
    """Segments that are computed together; the longest come first.

    Attributes:
        segments: N segments.
        counts: Number of segments with more than i chunks, for each step i of the scan.
        chunks: `[C, CHUNK]` positions of each chunk's tokens, in the order of the scan; T pads.
        tokens: Positions of all tokens, segment by segment.
        cu_seqlens: `[N + 1]` int64, start of each segment in `tokens`.
    """

    segments: tuple[Segment, ...]
    counts: tuple[int, ...]
    chunks: Tensor
    tokens: Tensor
    cu_seqlens: Tensor

    @classmethod
    def of(cls, segments: Sequence[Segment], padding: int, device: torch.device) -> _Level:
        ordered = sorted(segments, key=lambda s: (s.start - s.end, s.start))
        lengths = torch.tensor([s.end - s.start for s in ordered])
        num_steps = -(-int(lengths[0]) // CHUNK)
        starts = torch.tensor([s.start for s in ordered])
        offsets = torch.arange(num_steps * CHUNK).view(num_steps, 1, CHUNK)
        positions = (starts[:, None] + offsets).where(offsets < lengths[:, None], padding)
        used = torch.arange(num_steps)[:, None] * CHUNK < lengths
        return cls(
            segments=tuple(ordered),
            counts=tuple(used.sum(1).tolist()),
            chunks=positions[used].to(device),
            tokens=torch.cat([torch.arange(s.start, s.end) for s in ordered]).to(device),
            cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)).to(device),
        )


@dataclass(frozen=True, slots=True)
class _Plan:
    """Order of computation of a packed sequence of T tokens.

    Attributes:
        levels: Segments without a prefix; if there are any, segments with a prefix.
        parents: For each segment with a prefix, the index of its prefix in the first level.
        order: `[T]` index of each token in the concatenated chunks of all levels.
    """

    levels: tuple[_Level, ...]
    parents: Tensor
    order: Tensor


@lru_cache(maxsize=8)
def _plan(segments: tuple[Segment, ...], device: torch.device) -> _Plan:
    """Return the plan of these segments, which is the same for all layers.

    Raises:
        ValueError: A prefix is not a segment without a prefix.
    """
    length = segments[-1].end
    branches = [s for s in segments if s.prefix[1] > s.prefix[0]]
    roots = _Level.of([s for s in segments if s not in branches], length, device)
    index = {(s.start, s.end): i for i, s in enumerate(roots.segments)}
    if missing := [s.prefix for s in branches if s.prefix not in index]:
        raise ValueError(f"prefix {missing[0]} is not a segment; recurrent layers can only fork whole segments")
    levels = (roots, _Level.of(branches, length, device)) if branches else (roots,)
    parents = [index[s.prefix] for s in levels[-1].segments] if branches else []
    slots = torch.cat([level.chunks.flatten() for level in levels])
    order = torch.empty(length + 1, dtype=torch.long, device=device)
    order[slots] = torch.arange(len(slots), device=device)
    return _Plan(levels, torch.tensor(parents, dtype=torch.long, device=device), order[:-1])


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, segments: Sequence[Segment]
) -> Tensor:
    """Compute the outputs of one packed sequence; queries and keys are normalized to length 1.

    Args:
        query: `[T, key heads, key width]`; divided by the square root of the key width.
        key: `[T, key heads, key width]`; a key head serves consecutive value heads.
        value: `[T, value heads, value width]`.
        decay: `[T, value heads]` g, the logarithm of the decay, at most 0.
        beta: `[T, value heads]` between 0 and 1.
        segments: Segments of the sequence, in order and without gaps.

    Returns:
        `[T, value heads, value width]` in the dtype of `value`.
    """
    half = value.dtype in (torch.bfloat16, torch.float16)
    kernel = value.is_cuda and half and _kernel_agrees(value.device, value.dtype, key.shape[-1], value.shape[-1])
    rule = _kernel if kernel else _portable
    return rule(query, key, value, decay, beta, _plan(tuple(segments), value.device))


def _portable(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, plan: _Plan) -> Tensor:
    """Compute in float32, or in float64 for float64 values."""
    dtype, (_, key_heads, width) = accumulation_dtype(value.dtype), key.shape
    query, key = (t.to(dtype) * (t.to(dtype).square().sum(-1, keepdim=True) + _EPSILON).rsqrt() for t in (query, key))
    slots = torch.cat([level.chunks.flatten() for level in plan.levels])

    def in_chunks(tensor: Tensor) -> Tensor:
        """`[T, heads, width]` -> `[chunks, key heads, value heads per key head, CHUNK, width]`."""
        padded = F.pad(tensor.to(dtype), (0, 0, 0, 0, 0, 1)).index_select(0, slots)
        return padded.view(-1, CHUNK, key_heads, tensor.shape[1] // key_heads, tensor.shape[2]).movedim(1, 3)

    q, k, v = in_chunks(query * width**-0.5), in_chunks(key), in_chunks(value)
    b, cumulative = in_chunks(beta[..., None]), in_chunks(decay[..., None]).squeeze(-1).cumsum(-1)
    future = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=value.device).triu(1)
    pairwise = (cumulative[..., :, None] - cumulative[..., None, :]).masked_fill(future, float("-inf")).exp()
    from_start = cumulative.exp()[..., None]
    # Corrections of a chunk depend on each other: a triangular system, for the values and for what the state holds.
    corrections = torch.linalg.solve_triangular(
        b * (k @ k.mT) * pairwise, b * torch.cat([v, (k * from_start).expand(*v.shape[:-1], -1)], -1),
        upper=False, unitriangular=True,
    )  # fmt: skip
    new_values, state_keys = corrections.split([v.shape[-1], width], -1)
    to_end = (cumulative[..., -1:] - cumulative).exp()[..., None]
    steps = (new_values, state_keys, q * from_start, (q @ k.mT) * pairwise, (k * to_end).mT, from_start[..., -1:, :])
    out = torch.cat(_scan_levels(steps, plan)).movedim(3, 1)
    return out.reshape(-1, *value.shape[1:]).index_select(0, plan.order).to(value.dtype)


def _scan_levels(inputs: Sequence[Tensor], plan: _Plan) -> list[Tensor]:
    """Carry the states through the chunks; return the outputs of each step, `[segments, heads.., CHUNK, width]`."""
    # Splitting once keeps the backward pass linear in the number of chunks.
    steps = zip(*(t.split([n for level in plan.levels for n in level.counts]) for t in inputs), strict=True)
    new_values, state_keys = inputs[:2]
    shape = (*new_values.shape[1:3], state_keys.shape[-1], new_values.shape[-1])
    state = new_values.new_zeros(len(plan.levels[0].segments), *shape)
    outputs: list[Tensor] = []
    for depth, level in enumerate(plan.levels):
        if depth:
            state = state.index_select(0, plan.parents)
        ended: list[Tensor] = []
        for count in level.counts:
            values, keys, queries, scores, writes, decay = next(steps)
            ended.append(state[count:])
            state = state[:count]
            values = values - keys @ state
            outputs.append(queries @ state + scores @ values)
            state = state * decay + writes @ values
        state = torch.cat([state, *reversed(ended)])
    return outputs


def _kernel(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, plan: _Plan) -> Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    repeats = value.shape[1] // key.shape[1]
    query, key = (t.repeat_interleave(repeats, dim=1) for t in (query, key))
    outputs: list[Tensor] = []
    state: Tensor | None = None
    for depth, level in enumerate(plan.levels):
        out, state = chunk_gated_delta_rule(
            *(t.index_select(0, level.tokens)[None] for t in (query, key, value, decay, beta)),
            initial_state=state.index_select(0, plan.parents) if state is not None else None,
            output_final_state=depth + 1 < len(plan.levels),
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=level.cu_seqlens,
        )
        outputs.append(out[0])
    tokens = torch.cat([level.tokens for level in plan.levels])
    return torch.cat(outputs).index_select(0, tokens.argsort())


@lru_cache
def _kernel_agrees(device: torch.device, dtype: torch.dtype, key_width: int, value_width: int) -> bool:
    """Compare output and gradients of the kernel with the portable form, once per device, dtype and widths."""
    if find_spec("fla") is None:
        log.warning(
            "flash-linear-attention is not installed; linear attention is slower without it. "
            "Install it with: pip install flash-linear-attention"
        )
        return False
    generator = torch.Generator().manual_seed(0)
    segments = (Segment(0, 70), Segment(70, 75, (0, 70)), Segment(75, 145, (0, 70)), Segment(145, 147))
    shapes = ((2, key_width), (2, key_width), (4, value_width))
    inputs = [torch.randn(147, *shape, generator=generator).to(device, dtype) for shape in shapes]
    gates = torch.randn(147, 2, 4, generator=generator).to(device)
    inputs += [F.logsigmoid(gates[:, 0]), gates[:, 1].sigmoid().to(dtype)]
    grad_output = torch.randn(147, 4, value_width, generator=generator).to(device, dtype)

    def run(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *tensors: rule(*tensors, _plan(segments, device))

    failure = kernel_failure(run(_kernel), run(_portable), inputs, grad_output, ("dQ", "dK", "dV", "dG", "dBeta"))
    if failure is not None:
        log.warning("Disabling the linear-attention kernel for %s on %s: %s", dtype, device, failure)
    return failure is None
