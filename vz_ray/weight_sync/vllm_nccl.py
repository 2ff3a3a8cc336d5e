"""vLLM side of the NCCL transport, with a completeness check.

vLLM's own engine silently keeps the old weights of a layer that received none; this one raises. A
worker outside the NCCL group (it joined between publishes or is preemptible) loads a copy from shared
memory instead. The test suite runs without GPUs and covers only the copies.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)

from vz_ray.weight_sync.vllm_plugin import CompleteReload, ShmUpdateInfo
from vz_ray.weight_sync.weight_store import WeightIntegrityError


class VerifiedNcclWeightTransferEngine(CompleteReload, NCCLWeightTransferEngine):
    """vLLM's NCCL engine that requires every tensor exactly once and every layer complete."""

    model_update_group: Any

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        if "directory" in update_dict:
            return ShmUpdateInfo(**update_dict)
        return super().parse_update_info(update_dict)

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        """Join a new NCCL group. vLLM's own method would leak the communicator of the old one."""
        if self.model_update_group is not None:
            self.model_update_group.destroy()
            self.model_update_group = None
        super().init_transfer_engine(init_info)

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo | ShmUpdateInfo) -> None:
        if isinstance(update_info, ShmUpdateInfo):
            self.load_version(update_info)
            return
        if duplicates := {name for name in update_info.names if update_info.names.count(name) > 1}:
            raise WeightIntegrityError(f"{sorted(duplicates)[0]} was announced twice")
        super().receive_weights(update_info)
