"""vLLM's NCCL weight transfer, made to notice what did not arrive.

The built-in engine keeps the old weights of a layer that got none; this one
refuses. Not exercised by the test suite, which runs without GPUs.
"""

from __future__ import annotations

from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)

from vz_ray.weights.reload import Reload
from vz_ray.weights.store import WeightsBroken


class CompleteNcclEngine(NCCLWeightTransferEngine):
    """The built-in NCCL engine, with every name exactly once and every layer renewed."""

    _reload: Reload | None = None

    def start_weight_update(self) -> None:
        self._reload = Reload(self.model, self.model_config)

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        if twice := {name for name in update_info.names if update_info.names.count(name) > 1}:
            raise WeightsBroken(f"{sorted(twice)[0]} was announced twice")
        super().receive_weights(update_info)

    def finish_weight_update(self) -> None:
        if self._reload is None:
            raise RuntimeError("finish_weight_update without start_weight_update")
        self._reload.finish()
        self._reload = None
