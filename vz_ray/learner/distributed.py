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

from vz_ray.utils.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RankInfo:
    """Rank of this process.

    Attributes:
        rank: 0 <= rank < world_size.
        world_size: Number of ranks.
        device: Device of this rank's tensors.
    """

    rank: int
    world_size: int
    device: torch.device


def init_distributed(timeout_s: float) -> RankInfo:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* describe.

    Without RANK the process forms a group alone. Call this before DeepSpeed is initialized: the group that
    DeepSpeed creates binds the device, which hangs NCCL weight transfer.
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
    return RankInfo(rank, world_size, torch.device("cuda", local_rank) if cuda else torch.device("cpu"))


def shutdown_distributed() -> None:
    """Destroy the process group; otherwise its threads can abort the process at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(values: dict[str, float], rank_info: RankInfo) -> dict[str, float]:
    """Sum each value over ranks; every rank must pass the same names."""
    if rank_info.world_size == 1:
        return dict(values)
    names = sorted(values)
    tensor = torch.tensor([values[name] for name in names], dtype=torch.float64)
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
            raise shared
    if error is not None:
        raise error
    failed = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(failures) if text]
    if failed:
        raise RuntimeError(f"{operation} failed on {'; '.join(failed)}")
