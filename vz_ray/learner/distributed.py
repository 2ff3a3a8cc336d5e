"""This process's place among the ranks; plain torch.distributed, started before DeepSpeed."""

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
    """Attributes:
    rank: 0 <= rank < world.
    world_size: Number of ranks.
    device: Where this rank's tensors live.
    """

    rank: int
    world_size: int
    device: torch.device


def init_distributed(timeout_s: float) -> RankInfo:
    """Joins the process group that RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* describe.

    A process without RANK is a group of its own. DeepSpeed must find the group
    ready: the one it makes itself binds the device, which hangs NCCL weight
    transfer.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.setdefault("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not dist.is_initialized():
        # Each with the device's own backend, and gloo beside it for objects.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        timeout = timedelta(seconds=timeout_s)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return RankInfo(rank, world, torch.device("cuda", local) if cuda else torch.device("cpu"))


def shutdown_distributed() -> None:
    """Leaves the process group; a process that ends without it may be aborted by the group's own threads."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(values: dict[str, float], place: RankInfo) -> dict[str, float]:
    """Sums each value over ranks; every rank must name the same ones."""
    if place.world_size == 1:
        return dict(values)
    names = sorted(values)
    tensor = torch.tensor([values[name] for name in names], dtype=torch.float64)
    dist.all_reduce(tensor)
    return dict(zip(names, tensor.tolist(), strict=True))


def all_reduce_max(value: float, place: RankInfo) -> float:
    """The largest of all ranks' values."""
    tensor = torch.tensor([value], dtype=torch.float64)
    if place.world_size > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


@contextmanager
def fail_together(place: RankInfo, operation: str) -> Iterator[None]:
    """All ranks leave the block together, or all fail: one rank's error is every rank's.

    Without it the others would wait in their next collective until the
    deadline, and the first error would look like a hang.

    Raises:
        RuntimeError: `operation` failed on another rank; the message says which and why.
    """
    error: BaseException | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    faults: list[str | None] = [None] * place.world_size
    if place.world_size > 1:
        dist.all_gather_object(faults, f"{type(error).__name__}: {error}" if error else None)
    if error is not None:
        raise error
    failed = [f"rank {rank}: {fault}" for rank, fault in enumerate(faults) if fault]
    if failed:
        raise RuntimeError(f"{operation} failed on {'; '.join(failed)}")


@contextmanager
def reraise_on_all_ranks(place: RankInfo, error_type: type[Exception]) -> Iterator[None]:
    """`agree`, but an error of `error_type` is raised on all ranks, with the first one's message."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    said: list[str | None] = [str(error) if isinstance(error, error_type) else None]
    if place.world_size > 1:
        mine, said = said[0], [None] * place.world_size
        dist.all_gather_object(said, mine)
    first = next((text for text in said if text is not None), None)
    if first is not None:
        raise error_type(first) from error
    with fail_together(place, "a step that all ranks take"):
        if error is not None:
            raise error
