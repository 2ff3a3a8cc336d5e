"""CUDA IPC handles: an engine reads the learner's weights on a shared GPU without a copy.

    learner    IpcHandles.export() -> plain values that locate each tensor in GPU memory
    engine     open_tensor() -> the tensor; valid while the learner keeps its own

For machines with one GPU. Ray makes only the assigned GPUs visible to a process, and IPC handles of
other GPUs cannot be opened; use NCCL between GPUs. The test suite runs without GPUs and does not
cover the GPU calls.
"""

from __future__ import annotations

from typing import Any

import torch

from vz_ray.weight_sync.weight_source import WeightSource
from vz_ray.weight_sync.weight_store import WeightIntegrityError
from vz_ray.weight_sync.weight_version import torch_dtype

_BUCKET_BYTES = 1 << 30
_STORAGE_ARGS, _REFCOUNT_ARGS = slice(7, 10), slice(11, 15)
"""Arguments of torch's `rebuild_cuda_tensor` that another process needs."""


class IpcHandles:
    """Learner side. Exported tensors stay alive until the next export."""

    def __init__(self) -> None:
        self._exported: list[torch.Tensor] = []

    def export(self, source: WeightSource) -> tuple[dict[str, Any], int]:
        """Return the `update_info` for an engine on the same GPU, and the size of the weights in bytes."""
        from torch.multiprocessing.reductions import reduce_tensor

        specs = source.specs()
        self._exported = [tensor.contiguous() for bucket in source.buckets(_BUCKET_BYTES) for tensor in bucket.values()]
        handles = []
        for tensor in self._exported:
            _, rebuild_args = reduce_tensor(tensor)
            handles.append([tensor.storage_offset(), *rebuild_args[_STORAGE_ARGS], *rebuild_args[_REFCOUNT_ARGS]])
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
    """Open an exported tensor in the learner's memory."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    offset, handle, size, start, *counters = handle
    stride = torch.empty(shape, device="meta").stride()
    return rebuild_cuda_tensor(
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


def gpu_uuid(device: int) -> str:
    """Return the UUID of the GPU, which is the same in every process."""
    return str(torch.cuda.get_device_properties(device).uuid)


def check_same_gpu(learner_gpu: str, engine_gpu: str) -> None:
    """Raise `WeightIntegrityError` if learner and engine use different GPUs."""
    if learner_gpu != engine_gpu:
        raise WeightIntegrityError(
            f"the learner's weights are on GPU {learner_gpu} and this engine runs on GPU {engine_gpu}; "
            "weights.transport=ipc needs one shared GPU. Use nccl."
        )
