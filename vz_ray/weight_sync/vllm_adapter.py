"""Load the policy's adapter into a running vLLM engine, beside the weights of its checkpoint.

The engine holds one adapter, which every request names: paused turns continue with the new version, and the
publish clears the caches that its keys and values are in. vLLM forgets its adapters when a weight update ends.
`AdapterWorker.activate_adapter` then installs the received one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest

from vz_ray.weight_sync.weight_store import WeightIntegrityError
from vz_ray.weight_sync.weight_version import ADAPTER_PARTS

ADAPTED_LAYERS_KEY = "vz_ray_adapted_layers"
"""Key in vLLM's `additional_config`: HF names of the layers with an adapter."""
_ADAPTER_ID = 1


def adapter_request() -> LoRARequest:
    """Return the adapter of a request. vLLM requires a path; it is part of the prefix cache's keys and not read."""
    return LoRARequest("policy", _ADAPTER_ID, "published")


class AdapterReload:
    """One update of an engine's adapter, with the interface of `WeightReload`.

    Args:
        model: vLLM model, or this rank's shard, with LoRA enabled.
        layers: HF names of all layers with an adapter.
        dtype: Dtype of the adapter.
    """

    def __init__(self, model: Any, layers: Iterable[str], dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        self._missing = {layer + part for layer in layers for part in ADAPTER_PARTS}
        self._expected = frozenset(self._missing)
        self._tensors: dict[str, torch.Tensor] = {}

    def load(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Copy tensors to host memory: the sender reuses theirs.

        Raises:
            WeightIntegrityError: A tensor occurs twice in this update, or is not a part of the adapter.
        """
        for name, tensor in tensors:
            if name not in self._expected:
                raise WeightIntegrityError(f"{name} is not a part of the engine's adapter")
            if name in self._tensors:
                raise WeightIntegrityError(f"{name} occurs twice in one weight update")
            self._tensors[name] = tensor.detach().to("cpu", copy=True)
            self._missing.remove(name)

    load_weights = load
    """Name of the method that vLLM's NCCL backend calls."""

    def copy_pending(self) -> None:
        """Do nothing: `load` copies."""

    def finish(self) -> LoRAModel:
        """Return the adapter.

        Raises:
            WeightIntegrityError: A tensor is missing, or the engine has no place for a layer's adapter.
        """
        if self._missing:
            missing = sorted(self._missing)
            raise WeightIntegrityError(f"no new weights for {len(missing)} tensors, among them {missing[0]}")
        rank = max(tensor.shape[0] for name, tensor in self._tensors.items() if name.endswith(ADAPTER_PARTS[0]))
        adapter = LoRAModel.from_lora_tensors(
            _ADAPTER_ID,
            self._tensors,
            # alpha = rank: B is scaled already.
            PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),
            device="cpu",
            dtype=self._dtype,
            weights_mapper=self._model.hf_to_vllm_mapper.get_rename_mapper(),
        )
        manager = self._model.lora_manager
        places = {part for name in manager.modules for part in manager.packed_modules.get(name, [name])}
        if ignored := sorted(adapter.loras.keys() - places):
            raise WeightIntegrityError(f"vLLM would ignore the adapters of {len(ignored)} layers, such as {ignored[0]}")
        return adapter


class AdapterWorker:
    """Extension of vLLM's worker: installs the adapter that its weight transfer engine has received."""

    model_runner: Any
    weight_transfer_engine: Any

    def activate_adapter(self) -> None:
        """Install the received adapter; before the first publish, one of zeros."""
        manager, adapter = self.model_runner.lora_manager, self.weight_transfer_engine.adapter
        if adapter is None:
            manager.add_dummy_lora(adapter_request(), rank=1)
            return
        adapters = manager._adapter_manager
        adapters.remove_adapter(adapter.id)
        adapters.add_adapter(adapter)
        adapters.activate_adapter(adapter.id)
