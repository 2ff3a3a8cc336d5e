"""Sequence parallelism: the tokens of a packed sequence are split over ranks, except in attention.

Ulysses (arXiv 2309.14509): rank r of n holds the r-th part of the tokens in all layers. Attention needs every token
but treats heads separately, so that an all-to-all before it exchanges parts of the heads for parts of the tokens, and
one after it exchanges them back:

    [T / n, heads, d]  --gather_tokens-->  [T, heads / n, d]  --attention-->  --scatter_tokens-->  [T / n, heads, d]

Each rank adds the gradient of its own tokens; the sum over ranks is the gradient of the whole sequence. DeepSpeed's
Ulysses modules derive sequences from position ids and have no layout with shared prefixes; the two exchanges are all
that is needed of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SequenceShard:
    """This rank's part of every sequence.

    Attributes:
        rank: 0 <= rank < size.
        size: Number of ranks that share a sequence, `learner.sequence_parallel_size`.
        group: Their process group.
    """

    rank: int
    size: int
    group: Any

    def padded_length(self, length: int) -> int:
        """Return the smallest multiple of the number of ranks that is at least `length`."""
        return -(-length // self.size) * self.size

    def token_range(self, length: int) -> tuple[int, int]:
        """Return start and end of this rank's tokens in a sequence of `padded_length(length)` tokens."""
        own = self.padded_length(length) // self.size
        return self.rank * own, (self.rank + 1) * own


def gather_tokens(tensor: Tensor, shard: SequenceShard) -> Tensor:
    """Exchange heads for tokens: `[T / n, heads, d] -> [T, heads / n, d]`, this rank's heads of all tokens."""
    blocks = tensor.unflatten(1, (shard.size, -1)).transpose(0, 1).contiguous()
    return _Exchange.apply(blocks, shard.group).flatten(0, 1)


def scatter_tokens(tensor: Tensor, shard: SequenceShard) -> Tensor:
    """Exchange tokens for heads: `[T, heads / n, d] -> [T / n, heads, d]`, the inverse of `gather_tokens`."""
    blocks = tensor.unflatten(0, (shard.size, -1)).contiguous()
    return _Exchange.apply(blocks, shard.group).transpose(0, 1).flatten(1, 2)


def gather_kv_tokens(tensor: Tensor, shard: SequenceShard) -> Tensor:
    """Exchange heads for tokens, `[T / n, kv heads, d] -> [T, max(1, kv heads / n), d]`.

    With fewer heads than ranks, each head goes to all ranks whose query heads use it.
    """
    if tensor.shape[1] < shard.size:
        tensor = tensor.repeat_interleave(shard.size // tensor.shape[1], dim=1)
    return gather_tokens(tensor, shard)


def own_heads(count: int, shard: SequenceShard | None) -> slice:
    """Return the range of this rank's heads after `gather_tokens`."""
    if shard is None:
        return slice(0, count)
    part = count // shard.size
    return slice(shard.rank * part, (shard.rank + 1) * part)


def sum_over_shards(tensor: Tensor, shard: SequenceShard) -> Tensor:
    """Return the sum over the ranks of a sequence. Its gradient passes to this rank's tensor only.

    All ranks compute the same loss from the sum, and each adds the gradient of its own part.
    """
    return _SumOverShards.apply(tensor, shard.group)


class _Exchange(torch.autograd.Function):
    """Send block i of `[n, ...]` to rank i; block i of the result is from rank i. Its own inverse."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, group: Any) -> Tensor:
        ctx.group = group
        received = torch.empty_like(blocks)
        dist.all_to_all_single(received, blocks, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        received = torch.empty_like(grads[0], memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, grads[0].contiguous(), group=ctx.group)
        return received, None


class _SumOverShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        total = tensor.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
