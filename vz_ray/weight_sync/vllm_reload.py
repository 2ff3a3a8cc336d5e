"""Load a complete set of HF tensors into a running vLLM model.

vLLM's layerwise reload handles weights that are packed or fused after loading. It silently keeps the
old weights of a layer that received none, and leaves a partially loaded layer undefined. Here both
are errors.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any
from weakref import WeakValueDictionary

import torch
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)

from vz_ray.weight_sync.weight_store import WeightIntegrityError


class WeightReload:
    """One weight update of one model. After an error, the model must not be used.

    Args:
        model: vLLM model, or this rank's shard.
        model_config: vLLM's `ModelConfig`.
    """

    def __init__(self, model: torch.nn.Module, model_config: Any) -> None:
        self._model: Any = model
        self._config = model_config
        self._seen: set[str] = set()
        self._copied = WeakValueDictionary[int, inspect.BoundArguments]()
        initialize_layerwise_reload(model)

    def load(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Load tensors under their HF names.

        Raises:
            WeightIntegrityError: A tensor occurs twice in this update.
            ValueError: vLLM's model has no parameter of that name.
        """

        def unique_tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in tensors:
                if name in self._seen:
                    raise WeightIntegrityError(f"{name} occurs twice in one weight update")
                self._seen.add(name)
                yield name, tensor

        self._model.load_weights(unique_tensors())

    def copy_pending(self) -> None:
        """Copy the tensors of incompletely loaded layers: the sender reuses their memory for the next part."""
        for layer in self._model.modules():
            for _, call in get_layerwise_info(layer).loaded_weights:
                if id(call) in self._copied:
                    continue
                self._copied[id(call)] = call
                for name, value in call.arguments.items():
                    if isinstance(value, torch.Tensor) and not value.is_meta:
                        call.arguments[name] = value.clone()

    def finish(self) -> None:
        """Activate the new weights.

        Raises:
            WeightIntegrityError: A parameter received no new values.
        """
        if missing := list(self._missing()):
            raise WeightIntegrityError(f"no new weights for {len(missing)} layers, among them {', '.join(missing[:3])}")
        finalize_layerwise_reload(self._model, self._config)
        self._refresh_tied_heads()

    def _missing(self) -> Iterator[str]:
        """Yield the layers with incompletely loaded parameters."""
        for name, layer in self._model.named_modules():
            info = get_layerwise_info(layer)
            if not info.can_load() or is_deferred_attention_layer(layer):
                continue  # complete layers have already been processed and reset
            expected = sum(parameter.numel() for parameter in layer._parameters.values() if parameter is not None)
            if not expected or self._is_tied(layer):
                continue
            # Embeddings are padded for alignment, and the padding is not loaded.
            padded = isinstance(layer, VocabParallelEmbedding)
            if info.load_numel == 0 or (info.load_numel < expected and not padded):
                yield f"{name} ({info.load_numel} of {expected} elements)"

    def _is_tied(self, layer: torch.nn.Module) -> bool:
        return isinstance(layer, ParallelLMHead) and bool(self._config.hf_text_config.tie_word_embeddings)

    def _refresh_tied_heads(self) -> None:
        """Repack tied output heads.

        A tied head shares the embedding's parameter and receives no tensor, so the reload skips it. On
        CPU it computes with a packed copy, which would be stale.
        """
        heads: list[Any] = [layer for layer in self._model.modules() if self._is_tied(layer)]
        for head in heads:
            head.quant_method.process_weights_after_loading(head)
