"""vLLM's side of a publish without NCCL: loads a version from shared memory.

vLLM calls `register` in each of its processes (entry point group
`vllm.general_plugins`). Imports neither Ray nor the fleet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from vz_ray.weights import vllm_cpu
from vz_ray.weights.backends import BACKENDS
from vz_ray.weights.orphan import exit_with_parent
from vz_ray.weights.reload import Reload
from vz_ray.weights.store import read_manifest, read_tensors


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """Nothing to connect to: every update names its directory."""


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """Attributes:
    directory: The version's directory in shared memory.
    checksum: Of the whole version, as its publisher announced it.
    """

    directory: str
    checksum: str


def load_directory(reload: Reload | None, update: ShmUpdateInfo) -> None:
    """Loads a version where it lies, each tensor checked before it is loaded."""
    if reload is None:
        raise RuntimeError("weights came before start_weight_update")
    manifest = read_manifest(update.directory)
    if manifest.version.checksum != update.checksum:
        raise RuntimeError(
            f"{update.directory} holds checksum {manifest.version.checksum[:12]}, "
            f"announced as {update.checksum[:12]}"
        )
    reload.load(read_tensors(update.directory, manifest))


class ShmWeightTransferEngine(WeightTransferEngine[ShmInitInfo, ShmUpdateInfo]):
    """Reads bucket files by mapping them, and checks each tensor before it is loaded."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo
    _reload: Reload | None = None

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        """Needs no connection."""

    def start_weight_update(self) -> None:
        self._reload = Reload(self.model, self.model_config)

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        load_directory(self._reload, update_info)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def finish_weight_update(self) -> None:
        if self._reload is None:
            raise RuntimeError("finish_weight_update without start_weight_update")
        self._reload.finish()
        self._reload = None

    def shutdown(self) -> None:
        """Holds nothing open."""
        self._reload = None


def register() -> None:
    """Makes the backends known to vLLM, in this process; may be called again."""
    exit_with_parent()
    vllm_cpu.install()
    if BACKENDS["shm"] in WeightTransferEngineFactory._registry:
        return
    WeightTransferEngineFactory.register_engine(BACKENDS["shm"], ShmWeightTransferEngine)
    WeightTransferEngineFactory.register_engine(
        BACKENDS["nccl"], "vz_ray.weights.nccl_engine", "CompleteNcclEngine"
    )
    WeightTransferEngineFactory.register_engine(
        BACKENDS["ipc"], "vz_ray.weights.ipc_engine", "IpcWeightTransferEngine"
    )
