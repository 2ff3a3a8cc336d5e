"""Handles of a learner rank's memory: the engine on the same GPU reads the weights without a copy.

    rank i      IpcExporter.next_part() -> plain values that locate the tensors of one bucket
    engine i    open_tensor() -> the tensors; valid until the rank exports the next bucket

On GPUs the handles are CUDA IPC handles, which only processes that see the same GPU can open; use NCCL between
GPUs. On CPU a bucket is copied to memory that the engine maps. The test suite runs without GPUs and covers only
the latter.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from typing import Any

import torch

from vz_ray.weight_sync.weight_source import WeightSource
from vz_ray.weight_sync.weight_store import WeightIntegrityError
from vz_ray.weight_sync.weight_version import dtype_name, tensor_bytes, torch_dtype

_STORAGE_ARGS, _REFCOUNT_ARGS = slice(7, 10), slice(11, 15)
"""Arguments of torch's `rebuild_cuda_tensor` that another process needs."""


class IpcExporter:
    """Learner side: exports the weights of one rank bucket by bucket.

    A bucket stays alive until the next call, so the GPU holds at most one gathered bucket.
    """

    def __init__(self) -> None:
        self._buckets: Iterator[dict[str, torch.Tensor]] = iter(())
        self._exported: list[torch.Tensor] = []
        self._shared_memory = -1

    def start(self, source: WeightSource, bucket_bytes: int) -> None:
        """Start to export a source; under ZeRO-3 all ranks must take the same steps."""
        self.stop()
        self._buckets = source.buckets(bucket_bytes)

    def next_part(self) -> dict[str, Any] | None:
        """Return the `update_info` of the next bucket for the engine on this GPU, or None after the last one."""
        self._release()
        bucket = next(self._buckets, None)
        if bucket is None:
            return None
        self._exported = [tensor.detach().contiguous() for tensor in bucket.values()]
        on_gpu = self._exported[0].is_cuda
        return {
            "gpu": gpu_uuid(self._exported[0].device),
            "names": list(bucket),
            "dtype_names": [dtype_name(tensor.dtype) for tensor in self._exported],
            "shapes": [list(tensor.shape) for tensor in self._exported],
            "handles": self._cuda_handles() if on_gpu else self._host_handles(),
        }

    def stop(self) -> None:
        """End an export and free its bucket. Idempotent."""
        self._release()
        if (close := getattr(self._buckets, "close", None)) is not None:
            close()
        self._buckets = iter(())

    def _release(self) -> None:
        self._exported = []
        if self._shared_memory >= 0:
            os.close(self._shared_memory)
            self._shared_memory = -1

    def _cuda_handles(self) -> list[list[Any]]:
        from torch.multiprocessing.reductions import reduce_tensor

        handles = []
        for tensor in self._exported:
            _, rebuild_args = reduce_tensor(tensor)
            handles.append([tensor.storage_offset(), *rebuild_args[_STORAGE_ARGS], *rebuild_args[_REFCOUNT_ARGS]])
        torch.cuda.synchronize()
        return handles

    def _host_handles(self) -> list[list[Any]]:
        """Copy the bucket to anonymous memory, which other processes open through this one's descriptor."""
        self._shared_memory = os.memfd_create("vz_ray_weights")
        path, offset, handles = f"/proc/{os.getpid()}/fd/{self._shared_memory}", 0, []
        with os.fdopen(os.dup(self._shared_memory), "wb") as file:
            for tensor in self._exported:
                handles.append([path, offset])
                offset += file.write(tensor_bytes(tensor))
        return handles


def open_tensor(handle: list[Any], dtype: str, shape: list[int], device: torch.device) -> torch.Tensor:
    """Open an exported tensor in the memory of a learner rank."""
    if device.type != "cuda":
        path, offset = handle
        count = torch.Size(shape).numel()
        with open(path, "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return torch.frombuffer(memory, dtype=torch_dtype(dtype), count=count, offset=offset).view(shape)
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    offset, handle, size, start, *counters = handle
    stride = torch.empty(shape, device="meta").stride()
    return rebuild_cuda_tensor(
        torch.Tensor,
        torch.Size(shape),
        stride,
        offset,
        torch.UntypedStorage,
        torch_dtype(dtype),
        device.index or 0,
        handle,
        size,
        start,
        False,
        *counters,
    )


def gpu_uuid(device: torch.device) -> str:
    """Return the UUID of a GPU, which is the same in every process; empty on CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def check_same_gpu(learner_gpu: str, engine_gpu: str) -> None:
    """Raise `WeightIntegrityError` if learner rank and engine use different GPUs."""
    if learner_gpu != engine_gpu:
        raise WeightIntegrityError(
            f"the learner's weights are on GPU {learner_gpu} and this engine runs on GPU {engine_gpu}; "
            "weights.transport=ipc needs one shared GPU. Use nccl."
        )
