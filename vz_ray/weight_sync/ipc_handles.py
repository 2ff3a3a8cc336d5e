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

from vz_ray.weight_sync.weight_source import WeightSource
from vz_ray.weight_sync.weight_store import WeightIntegrityError
from vz_ray.weight_sync.weight_version import torch_dtype

_BUCKET_BYTES = 1 << 30
_STORAGE_ARGS, _REFCOUNT_ARGS = slice(7, 10), slice(11, 15)
"""Where in the arguments of torch's `rebuild_cuda_tensor` the parts are that another process needs."""


class IpcHandles:
    """The learner's side. What is lent stays alive until the next lending."""

    def __init__(self) -> None:
        self._exported: list[torch.Tensor] = []

    def export(self, source: WeightSource) -> tuple[dict[str, Any], int]:
        """What an engine on the same GPU is told, and the bytes that it will read."""
        from torch.multiprocessing.reductions import reduce_tensor

        specs = source.specs()
        self._exported = [
            tensor.contiguous() for bucket in source.buckets(_BUCKET_BYTES) for tensor in bucket.values()
        ]
        handles = []
        for tensor in self._exported:
            _, where = reduce_tensor(tensor)
            handles.append([tensor.storage_offset(), *where[_STORAGE_ARGS], *where[_REFCOUNT_ARGS]])
        torch.cuda.synchronize()
        info = {
            "gpu": gpu_uuid(torch.cuda.current_device()),
            "names": [spec.name for spec in specs],
            "dtype_names": [spec.dtype for spec in specs],
            "shapes": [list(spec.shape) for spec in specs],
            "handles": handles,
        }
        return info, sum(spec.nbytes for spec in specs)


def open_tensor(handle: list[Any], dtype_name: str, shape: list[int], device: int) -> torch.Tensor:
    """A lent tensor, in the learner's memory."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    offset, handle, size, start, *counters = handle
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


def gpu_uuid(device: int) -> str:
    """The GPU's own name, the same in every process."""
    return str(torch.cuda.get_device_properties(device).uuid)


def check_same_gpu(learner_gpu: str, engine_gpu: str) -> None:
    """`WeightIntegrityError` if learner and engine are not on one GPU."""
    if learner_gpu != engine_gpu:
        raise WeightIntegrityError(
            f"the learner's weights are on GPU {learner_gpu} and this engine computes on GPU {engine_gpu}; "
            "weights.transport ipc is for one GPU that both share: use nccl"
        )
