"""vLLM's NCCL weight transfer, made to notice what did not arrive, and to take copies, too.

The built-in engine keeps the old weights of a layer that got none; this one
refuses. A worker that is in no group, since it joins between publishes or may
vanish in the middle of one, is told of a directory instead. The test suite,
which runs without GPUs, exercises copies, and not the broadcast.
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
    """The built-in NCCL engine, with every name exactly once and every layer renewed."""

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
        if twice := {name for name in update_info.names if update_info.names.count(name) > 1}:
            raise WeightIntegrityError(f"{sorted(twice)[0]} was announced twice")
        super().receive_weights(update_info)

    def finish_weight_update(self) -> None:
        if self._reload is None:
            raise RuntimeError("finish_weight_update without start_weight_update")
        self._reload.finish()
        self._reload = None
