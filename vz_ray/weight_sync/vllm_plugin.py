"""vLLM plugin: weight transfer from shared memory, and registration of all transfer backends.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). Without
`ENGINE_ENV_VAR`, which `VllmEngine` sets for its own processes, `register` does nothing. Must not
import Ray.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.lora.lora_model import LoRAModel

from vz_ray.weight_sync import vllm_cpu_patches
from vz_ray.weight_sync.backends import ENGINE_ENV_VAR, VLLM_BACKENDS
from vz_ray.weight_sync.parent_watchdog import exit_with_parent
from vz_ray.weight_sync.vllm_adapter import ADAPTED_LAYERS_KEY, AdapterReload
from vz_ray.weight_sync.vllm_reload import WeightReload
from vz_ray.weight_sync.weight_store import read_manifest, read_tensors


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """Empty: every update names its directory."""


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """Attributes:
    directory: Directory of the version in shared memory.
    checksum: Expected checksum of the version.
    """

    directory: str
    checksum: str


class CompleteReload:
    """Mixin for transfer engines: an update must load every layer completely, or every layer's adapter.

    Attributes:
        adapter: The last adapter received; None before the first, and in engines that receive all weights.
    """

    model: Any
    model_config: Any
    vllm_config: Any
    set_weight_update_target: Callable[[Any, Any], None]
    adapter: LoRAModel | None = None
    _reload: WeightReload | AdapterReload | None = None

    @property
    def reload(self) -> WeightReload | AdapterReload:
        """The current update."""
        if self._reload is None:
            raise RuntimeError("no weight update is in progress; call start_weight_update first")
        return self._reload

    def start_weight_update(self) -> None:
        lora = self.vllm_config.lora_config
        if lora is None:
            self._reload = WeightReload(self.model, self.model_config)
            return
        layers = self.vllm_config.additional_config[ADAPTED_LAYERS_KEY]
        self._reload = AdapterReload(self.model, layers, lora.lora_dtype)
        # The NCCL backend loads into the target; vLLM's worker resets it.
        self.set_weight_update_target(self._reload, self.model_config)

    def load_version(self, update: ShmUpdateInfo) -> None:
        """Load a version from its directory. Each tensor is checked before it is loaded."""
        manifest = read_manifest(update.directory)
        if manifest.checksum != update.checksum:
            raise RuntimeError(
                f"{update.directory} holds checksum {manifest.checksum[:12]}, announced as {update.checksum[:12]}"
            )
        self.reload.load(read_tensors(update.directory, manifest))

    def finish_weight_update(self) -> None:
        self.adapter = self.reload.finish()
        self._reload = None


class ShmWeightTransferEngine(CompleteReload, WeightTransferEngine[ShmInitInfo, ShmUpdateInfo]):
    """Load memory-mapped bucket files and check each tensor before it is loaded."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        """Do nothing: there is no connection."""

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        self.load_version(update_info)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def shutdown(self) -> None:
        """Discard an unfinished update."""
        self._reload = None


def register() -> None:
    """Register the transfer backends and install patches in this process. Idempotent."""
    if ENGINE_ENV_VAR not in os.environ:
        return
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
