"""Process group of the ranks and collectives on Python values; plain torch.distributed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from vz_ray.learner.sequence_parallel import SequenceShard
from vz_ray.utils.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RankInfo:
    """Rank of this process.

    Attributes:
        rank: 0 <= rank < world_size.
        world_size: Number of ranks.
        device: Device of this rank's tensors.
        shard: This rank's part of every sequence; None if each rank has sequences of its own.
    """

    rank: int
    world_size: int
    device: torch.device
    shard: SequenceShard | None = None

    @property
    def num_batches(self) -> int:
        """Number of micro-batches that are computed at the same time."""
        return self.world_size // (self.shard.size if self.shard else 1)

    @property
    def batch_index(self) -> int:
        """Index of this rank's micro-batch among them."""
        return self.rank // (self.shard.size if self.shard else 1)

    @property
    def reports_batch(self) -> bool:
        """Whether sums over ranks include this rank; of ranks that share a sequence, the first."""
        return self.shard is None or self.shard.rank == 0


def init_distributed(timeout_s: float, sequence_parallel_size: int = 1) -> RankInfo:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* describe.

    Without RANK the process forms a group alone. Call this before DeepSpeed is initialized: the group that
    DeepSpeed creates binds the device, which hangs NCCL weight transfer.

    Args:
        sequence_parallel_size: Number of consecutive ranks that share each sequence.

    Raises:
        UserError: It does not divide the number of ranks.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not dist.is_initialized():
        # Gloo beside NCCL, for collectives on Python objects.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        timeout = timedelta(seconds=timeout_s)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    return RankInfo(rank, world_size, device, _create_shard(rank, world_size, sequence_parallel_size))


def _create_shard(rank: int, world_size: int, size: int) -> SequenceShard | None:
    """Create the groups of ranks that share sequences, and return this rank's part."""
    if world_size % size:
        raise UserError(
            f"learner.sequence_parallel_size is {size}; it does not divide the {world_size} ranks of the learner"
        )
    if size == 1:
        return None
    # Every rank must create every group.
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world_size, size)]
    return SequenceShard(rank % size, size, groups[rank // size])


def shutdown_distributed() -> None:
    """Destroy the process group; otherwise its threads can abort the process at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(values: dict[str, float], rank_info: RankInfo) -> dict[str, float]:
    """Sum each value over ranks; every rank must pass the same names.

    Ranks that share a sequence have the same values, which count once.
    """
    if rank_info.world_size == 1:
        return dict(values)
    names = sorted(values)
    tensor = torch.tensor([values[name] * rank_info.reports_batch for name in names], dtype=torch.float64)
    dist.all_reduce(tensor)
    return dict(zip(names, tensor.tolist(), strict=True))


def all_reduce_max(value: float, rank_info: RankInfo) -> float:
    """Return the maximum over ranks."""
    tensor = torch.tensor([value], dtype=torch.float64)
    if rank_info.world_size > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def all_gather_object(value: T, rank_info: RankInfo) -> list[T]:
    """Return every rank's value, by rank."""
    values = [value] * rank_info.world_size
    if rank_info.world_size > 1:
        dist.all_gather_object(values, value)
    return values


@contextmanager
def fail_together(rank_info: RankInfo, operation: str) -> Iterator[None]:
    """Raise on all ranks if the block fails on one.

    Otherwise the other ranks would wait in their next collective until the timeout, and the first error
    would look like a hang.

    Raises:
        UserError: The block raised it on some rank; the lowest such rank's error is raised on all ranks.
        RuntimeError: `operation` failed on another rank; the message holds the rank and its error.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    user_error = error if isinstance(error, UserError) else None
    failures = all_gather_object((user_error, f"{type(error).__name__}: {error}" if error else None), rank_info)
    for shared, _ in failures:
        if shared is not None:
            if shared is not error:
                shared.__cause__ = error  # of this rank; the error was pickled without its cause
            raise shared
    if error is not None:
        raise error
    failed = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(failures) if text]
    if failed:
        raise RuntimeError(f"{operation} failed on {'; '.join(failed)}")
