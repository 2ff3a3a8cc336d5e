"""vLLM side of the IPC transport: read weights in the memory of the learner rank on the same GPU, in parts.

A worker that joins between publishes loads a copy from shared memory instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.weight_transfer.base import WeightTransferUpdateInfo

from vz_ray.weight_sync.ipc_handles import check_same_gpu, gpu_uuid, open_part
from vz_ray.weight_sync.vllm_plugin import ShmUpdateInfo, ShmWeightTransferEngine


@dataclass
class IpcUpdateInfo(WeightTransferUpdateInfo):
    """Result of `IpcExporter.next_part`."""

    gpu: str
    storages: list[list[Any]]
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    locations: list[list[int]]


class IpcWeightTransferEngine(ShmWeightTransferEngine):
    """Load parts of the weights from IPC handles, or all from a copy in shared memory."""

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        if "directory" in update_dict:
            return ShmUpdateInfo(**update_dict)
        return IpcUpdateInfo(**update_dict)

    def receive_weights(self, update_info: ShmUpdateInfo | IpcUpdateInfo) -> None:
        if isinstance(update_info, ShmUpdateInfo):
            super().receive_weights(update_info)
            return
        check_same_gpu(update_info.gpu, gpu_uuid(self.device))
        self.reload.load(open_part(vars(update_info), self.device))
        self.reload.copy_pending()
