"""vLLM side of the NCCL transport, with a completeness check.

vLLM's own engine silently keeps the old weights of a layer that received none; this one raises. A
worker outside the NCCL group (it joined between publishes or is preemptible) loads a copy from shared
memory instead. The test suite runs without GPUs and covers only the copies.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)

from vz_ray.weight_sync.vllm_plugin import ShmUpdateInfo, load_version
from vz_ray.weight_sync.vllm_reload import WeightReload
from vz_ray.weight_sync.weight_store import WeightIntegrityError


class VerifiedNcclWeightTransferEngine(NCCLWeightTransferEngine):
    """vLLM's NCCL engine that requires every tensor exactly once and every layer complete."""

    _reload: WeightReload | None = None

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        if "directory" in update_dict:
            return ShmUpdateInfo(**update_dict)
        return super().parse_update_info(update_dict)

    def start_weight_update(self) -> None:
        self._reload = WeightReload(self.model, self.model_config)

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo | ShmUpdateInfo) -> None:
        if isinstance(update_info, ShmUpdateInfo):
            load_version(self._reload, update_info)
            return
        if duplicates := {name for name in update_info.names if update_info.names.count(name) > 1}:
            raise WeightIntegrityError(f"{sorted(duplicates)[0]} was announced twice")
        super().receive_weights(update_info)

    def finish_weight_update(self) -> None:
        if self._reload is None:
            raise RuntimeError("finish_weight_update without start_weight_update")
        self._reload.finish()
        self._reload = None
