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

from vz_ray.weight_sync import vllm_cpu_patches
from vz_ray.weight_sync.backends import VLLM_BACKENDS
from vz_ray.weight_sync.parent_watchdog import exit_with_parent
from vz_ray.weight_sync.vllm_reload import WeightReload
from vz_ray.weight_sync.weight_store import read_manifest, read_tensors


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


def load_version(reload: WeightReload | None, update: ShmUpdateInfo) -> None:
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
    _reload: WeightReload | None = None

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        """Needs no connection."""

    def start_weight_update(self) -> None:
        self._reload = WeightReload(self.model, self.model_config)

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        load_version(self._reload, update_info)

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
    vllm_cpu_patches.install_patches()
    if VLLM_BACKENDS["shm"] in WeightTransferEngineFactory._registry:
        return
    WeightTransferEngineFactory.register_engine(VLLM_BACKENDS["shm"], ShmWeightTransferEngine)
    WeightTransferEngineFactory.register_engine(
        VLLM_BACKENDS["nccl"], "vz_ray.weight_sync.vllm_nccl", "VerifiedNcclWeightTransferEngine"
    )
    WeightTransferEngineFactory.register_engine(
        VLLM_BACKENDS["ipc"], "vz_ray.weight_sync.vllm_ipc", "IpcWeightTransferEngine"
    )
