"""Weights on a GPU that learner and engine share: the engine reads them where they lie.

    learner    lend() -> plain values that say where in the GPU's memory each tensor is
    engine     borrow() -> the tensors, without a copy; valid while the learner keeps its own

For machines with one GPU. Ray shows every process its own GPUs only, and memory of a GPU that a
process cannot see cannot be opened there: between GPUs, weights go by NCCL. Not exercised by the
test suite, which runs without GPUs.
"""

from __future__ import annotations

from typing import Any

import torch

from vz_ray.weights.source import WeightSource
from vz_ray.weights.store import WeightsBroken
from vz_ray.weights.version import torch_dtype

_BUCKET_BYTES = 1 << 30
_STORAGE, _COUNTERS = slice(7, 10), slice(11, 15)
"""Where in the arguments of torch's `rebuild_cuda_tensor` the parts are that another process needs."""


class Loans:
    """The learner's side. What is lent stays alive until the next lending."""

    def __init__(self) -> None:
        self._lent: list[torch.Tensor] = []

    def lend(self, source: WeightSource) -> tuple[dict[str, Any], int]:
        """What an engine on the same GPU is told, and the bytes that it will read."""
        from torch.multiprocessing.reductions import reduce_tensor

        specs = source.specs()
        self._lent = [
            tensor.contiguous() for bucket in source.buckets(_BUCKET_BYTES) for tensor in bucket.values()
        ]
        loans = []
        for tensor in self._lent:
            _, where = reduce_tensor(tensor)
            loans.append([tensor.storage_offset(), *where[_STORAGE], *where[_COUNTERS]])
        torch.cuda.synchronize()
        info = {
            "gpu": gpu_of(torch.cuda.current_device()),
            "names": [spec.name for spec in specs],
            "dtype_names": [spec.dtype for spec in specs],
            "shapes": [list(spec.shape) for spec in specs],
            "loans": loans,
        }
        return info, sum(spec.nbytes for spec in specs)


def borrow(loan: list[Any], dtype_name: str, shape: list[int], device: int) -> torch.Tensor:
    """A lent tensor, in the learner's memory."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    offset, handle, size, start, *counters = loan
    stride = torch.empty(shape, device="meta").stride()
    rebuilt: torch.Tensor = rebuild_cuda_tensor(
        torch.Tensor,
        torch.Size(shape),
        stride,
        offset,
        torch.UntypedStorage,
        torch_dtype(dtype_name),
        device,
        handle,
        size,
        start,
        False,
        *counters,
    )
    return rebuilt


def gpu_of(device: int) -> str:
    """The GPU's own name, the same in every process."""
    return str(torch.cuda.get_device_properties(device).uuid)


def check_gpu(theirs: str, ours: str) -> None:
    """`WeightsBroken` if learner and engine are not on one GPU."""
    if theirs != ours:
        raise WeightsBroken(
            f"the learner's weights are on GPU {theirs} and this engine computes on GPU {ours}; "
            "weights.transport ipc is for one GPU that both share: use nccl"
        )
