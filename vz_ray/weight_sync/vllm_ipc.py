"""vLLM side of the IPC transport: read weights in the learner's GPU memory.

A worker that joins between publishes loads a copy from shared memory instead. The test suite runs
without GPUs and covers only the copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.weight_transfer.base import WeightTransferUpdateInfo

from vz_ray.weight_sync.ipc_handles import check_same_gpu, gpu_uuid, open_tensor
from vz_ray.weight_sync.vllm_plugin import ShmUpdateInfo, ShmWeightTransferEngine


@dataclass
class IpcUpdateInfo(WeightTransferUpdateInfo):
    """Result of `IpcHandles.export`."""

    gpu: str
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    handles: list[list[Any]]


class IpcWeightTransferEngine(ShmWeightTransferEngine):
    """Load weights from IPC handles, or from a copy in shared memory."""

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        if "directory" in update_dict:
            return ShmUpdateInfo(**update_dict)
        return IpcUpdateInfo(**update_dict)

    def receive_weights(self, update_info: ShmUpdateInfo | IpcUpdateInfo) -> None:
        if isinstance(update_info, ShmUpdateInfo):
            super().receive_weights(update_info)
            return
        device = self.device.index or 0
        check_same_gpu(update_info.gpu, gpu_uuid(device))
        parts = zip(update_info.names, update_info.handles, update_info.dtype_names, update_info.shapes, strict=True)
        self.reload.load((name, open_tensor(handle, dtype, shape, device)) for name, handle, dtype, shape in parts)
