"""Handles of a learner rank's memory: the engine on the same GPU reads the weights without a copy.

    rank i      IpcExporter.next_part() -> plain values that locate the tensors of one bucket
    engine i    open_part() -> the tensors; valid until the rank exports the next bucket

On GPUs the handles are CUDA IPC handles, which only processes that see the same GPU can open; use NCCL between
GPUs. On CPU a bucket is copied to memory that the engine maps. The test suite runs without GPUs and covers only
the latter.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vz_ray.weight_sync.weight_source import WeightSource
from vz_ray.weight_sync.weight_store import WeightIntegrityError
from vz_ray.weight_sync.weight_version import dtype_name, tensor_bytes, torch_dtype

_ALIGN = 64
_STORAGE_ARGS, _REFCOUNT_ARGS = slice(7, 10), slice(11, 15)
"""Arguments of torch's `rebuild_cuda_tensor` that another process needs."""
_COUNTER_BYTES = 8
_SHARED_MEMORY = Path("/dev/shm")


class IpcExporter:
    """Learner side: exports the weights of one rank bucket by bucket.

    A bucket stays alive until the next call, so the GPU holds at most one gathered bucket.

    torch counts the references of other processes to exported memory, and frees it only if the count is 0. A receiver
    that failed would keep the whole bucket, or the learner's own weights; its references are dropped here.
    """

    def __init__(self) -> None:
        self._buckets: Iterator[dict[str, torch.Tensor]] = iter(())
        self._exported: list[torch.Tensor] = []
        self._counters: list[tuple[bytes, int]] = []
        self._shared_memory = -1

    def start(self, source: WeightSource, bucket_bytes: int) -> None:
        """Start to export a source; under ZeRO-3 all ranks must take the same steps."""
        self.stop()
        self._buckets = source.buckets(bucket_bytes)

    def next_part(self, *, has_receiver: bool = True) -> dict[str, Any] | None:
        """Return the `update_info` of the next bucket for the engine on this GPU, or None after the last one.

        Args:
            has_receiver: Whether the engine received all buckets so far and waits for this one. If not, the bucket is
                gathered and not exported.

        Returns:
            An empty dict if `has_receiver` is false.
        """
        self._release(received=has_receiver)
        bucket = next(self._buckets, None)
        if bucket is None:
            return None
        if not has_receiver:
            return {}
        self._exported = [tensor.detach().contiguous() for tensor in bucket.values()]
        device = self._exported[0].device
        storages, locations = self._export_cuda() if device.type == "cuda" else self._export_host()
        return {
            "gpu": gpu_uuid(device),
            "storages": storages,
            "names": list(bucket),
            "dtype_names": [dtype_name(tensor.dtype) for tensor in self._exported],
            "shapes": [list(tensor.shape) for tensor in self._exported],
            "locations": locations,
        }

    def stop(self) -> None:
        """End an export and free its bucket, which no engine reads anymore. Idempotent."""
        self._release(received=False)
        if (close := getattr(self._buckets, "close", None)) is not None:
            close()
        self._buckets = iter(())

    def _release(self, *, received: bool) -> None:
        """Free the bucket. If it was not received, drop the references of its receiver."""
        if not received:
            for file, index in self._counters:
                clear_counter(file, index)
        self._counters = []
        self._exported = []
        if self._shared_memory >= 0:
            os.close(self._shared_memory)
            self._shared_memory = -1

    def _export_cuda(self) -> tuple[list[list[Any]], list[list[int]]]:
        """Return a CUDA IPC handle per storage, and storage and byte offset of each tensor.

        A storage is shared once per part: each sharing counts as one use that the engine must release.
        """
        from torch.multiprocessing.reductions import reduce_tensor

        indices: dict[int, int] = {}
        storages: list[list[Any]] = []
        locations: list[list[int]] = []
        for tensor in self._exported:
            storage = tensor.untyped_storage()
            if storage._cdata not in indices:
                indices[storage._cdata] = len(storages)
                _, rebuild_args = reduce_tensor(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage))
                counter = rebuild_args[_REFCOUNT_ARGS]
                self._counters.append((counter[0], counter[1]))
                storages.append([storage.nbytes(), *rebuild_args[_STORAGE_ARGS], *counter])
            locations.append([indices[storage._cdata], int(tensor.storage_offset()) * tensor.element_size()])
        torch.cuda.synchronize()
        return storages, locations

    def _export_host(self) -> tuple[list[list[Any]], list[list[int]]]:
        """Copy the bucket to anonymous memory, which other processes open through this one's descriptor."""
        self._shared_memory = os.memfd_create("vz_ray_weights")
        offset, locations = 0, []
        with os.fdopen(os.dup(self._shared_memory), "wb") as file:
            for tensor in self._exported:
                offset += file.write(b"\0" * (-offset % _ALIGN))
                locations.append([0, offset])
                offset += file.write(tensor_bytes(tensor))
        return [[offset, f"/proc/{os.getpid()}/fd/{self._shared_memory}"]], locations


def clear_counter(file: bytes, index: int) -> None:
    """Set torch's count of references to an exported storage to 0, so that its owner can free the memory.

    A receiver that died while it loaded a bucket may have released some of the storages. torch's
    `_release_ipc_counter` would decrement their counts below 0, which keeps the memory forever.

    Args:
        file: Name of the shared memory that holds counters of 8 bytes.
        index: Position of the counter.
    """
    try:
        with open(_SHARED_MEMORY / os.fsdecode(file).lstrip("/"), "r+b", buffering=0) as counters:
            counters.seek(index * _COUNTER_BYTES)
            counters.write(bytes(_COUNTER_BYTES))
    except FileNotFoundError:
        return  # torch removes the file after its last storage


def open_part(info: Mapping[str, Any], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and tensors of a part, in the memory of a learner rank.

    Args:
        info: Result of `IpcExporter.next_part`.
        device: Device of the engine.
    """
    storages = [_open_storage(handle, device) for handle in info["storages"]]
    fields = (info["names"], info["dtype_names"], info["shapes"], info["locations"])
    for name, dtype, shape, (index, start) in zip(*fields, strict=True):
        size = torch.Size(shape).numel() * torch_dtype(dtype).itemsize
        yield name, storages[index][start : start + size].view(torch_dtype(dtype)).view(shape)


def _open_storage(handle: list[Any], device: torch.device) -> torch.Tensor:
    """Return the bytes of a storage."""
    if device.type != "cuda":
        size, path = handle
        with open(path, "rb") as file:
            return torch.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY), dtype=torch.uint8)
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    size, memory, memory_size, memory_offset, *counters = handle
    return rebuild_cuda_tensor(
        torch.Tensor,
        torch.Size([size]),
        (1,),
        0,
        torch.UntypedStorage,
        torch.uint8,
        device.index or 0,
        memory,
        memory_size,
        memory_offset,
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
