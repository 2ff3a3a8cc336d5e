"""Process group of the ranks and collectives on Python values; plain torch.distributed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


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


@contextmanager
def fail_together(rank_info: RankInfo, operation: str) -> Iterator[None]:
    """Raise on all ranks if the block fails on one.

    Otherwise the other ranks would wait in their next collective until the timeout, and the first error
    would look like a hang.

    Raises:
        RuntimeError: `operation` failed on another rank; the message holds the rank and its error.
    """
    error: BaseException | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    errors: list[str | None] = [None] * rank_info.world_size
    if rank_info.world_size > 1:
        dist.all_gather_object(errors, f"{type(error).__name__}: {error}" if error else None)
    if error is not None:
        raise error
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(errors) if text]
    if failed:
        raise RuntimeError(f"{operation} failed on {'; '.join(failed)}")


@contextmanager
def reraise_on_all_ranks(rank_info: RankInfo, error_type: type[Exception]) -> Iterator[None]:
    """Raise an error of `error_type` on all ranks, with the message of the lowest failing rank.

    Other errors are handled as in `fail_together`.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    message = str(error) if isinstance(error, error_type) else None
    messages: list[str | None] = [message]
    if rank_info.world_size > 1:
        messages = [None] * rank_info.world_size
        dist.all_gather_object(messages, message)
    first = next((text for text in messages if text is not None), None)
    if first is not None:
        raise error_type(first) from error
    with fail_together(rank_info, "a step of all ranks"):
        if error is not None:
            raise error
