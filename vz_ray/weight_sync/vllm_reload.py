"""Loads a whole set of HF tensors into a running vLLM model, or says what is missing.

vLLM's layerwise reload takes care of engines that pack or fuse weights after
loading. Left to itself it keeps the old weights of a layer that got none, and
undefined ones of a layer that got some; here both are errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
    """One weight update of one model; after an error the model must not be used.

    Args:
        model: A vLLM model, or this rank's part of it.
        model_config: vLLM's `ModelConfig`.
    """

    def __init__(self, model: torch.nn.Module, model_config: Any) -> None:
        self._model: Any = model
        self._config = model_config
        self._seen: set[str] = set()
        initialize_layerwise_reload(model)

    def load(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Loads some of the tensors, under their HF names.

        Raises:
            WeightsBroken: A name came twice.
            ValueError: vLLM's model has no parameter of that name.
        """

        def once() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in tensors:
                if name in self._seen:
                    raise WeightIntegrityError(f"{name} came twice in one weight update")
                self._seen.add(name)
                yield name, tensor

        self._model.load_weights(once())

    def finish(self) -> None:
        """Puts the new weights to use.

        Raises:
            WeightsBroken: A parameter was not given new values.
        """
        if missing := list(self._missing()):
            raise WeightIntegrityError(
                f"no new weights for {len(missing)} layers, among them {', '.join(missing[:3])}"
            )
        finalize_layerwise_reload(self._model, self._config)
        self._refresh_tied_heads()

    def _missing(self) -> Iterator[str]:
        """Layers with parameters that did not get all of their elements."""
        for name, layer in self._model.named_modules():
            info = get_layerwise_info(layer)
            if not info.can_load() or is_deferred_attention_layer(layer):
                continue  # a layer that has got everything is processed and reset already
            wanted = sum(
                parameter.numel() for parameter in layer._parameters.values() if parameter is not None
            )
            if not wanted or self._is_tied(layer):
                continue
            # Embeddings are padded for alignment, and padding is not loaded.
            padded = isinstance(layer, VocabParallelEmbedding)
            if info.load_numel == 0 or (info.load_numel < wanted and not padded):
                yield f"{name} ({info.load_numel} of {wanted} elements)"

    def _is_tied(self, layer: torch.nn.Module) -> bool:
        return isinstance(layer, ParallelLMHead) and bool(self._config.hf_text_config.tie_word_embeddings)

    def _refresh_tied_heads(self) -> None:
        """Packs a tied output head anew.

        It shares the embedding's parameter, gets no tensor of its own, and so is
        left alone by the reload; but on CPU it computes with a packed copy.
        """
        heads: list[Any] = [layer for layer in self._model.modules() if self._is_tied(layer)]
        for head in heads:
            head.quant_method.process_weights_after_loading(head)
