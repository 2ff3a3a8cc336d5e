"""Whole weights of the trainer under their HF names, for every ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from vz_ray.learner.lora import base_parameter_name, lora_deltas
from vz_ray.weight_sync.weight_source import split_into_buckets
from vz_ray.weight_sync.weight_version import TensorSpec, dtype_name


class ZeroWeightSource:
    """`WeightSource` over the parameters of an HF model under DeepSpeed.

    Tied tensors appear once, under the embedding's name. Every rank must iterate over `buckets` with the same
    `max_bytes`: under ZeRO-3 each bucket is gathered. Adapters are merged into copies of the weights; the
    trained parameters do not change. See `learner/lora.py`.
    """

    def __init__(self, hf: nn.Module) -> None:
        named = ((base_parameter_name(name), parameter) for name, parameter in hf.named_parameters())
        self._parameters = {name: parameter for name, parameter in named if name is not None}
        self._deltas = lora_deltas(hf)

    def specs(self) -> list[TensorSpec]:
        """Return names, dtypes and whole shapes, without moving data."""
        return [
            TensorSpec(name, dtype_name(p.dtype), tuple(getattr(p, "ds_shape", p.shape)))
            for name, p in self._parameters.items()
        ]

    def buckets(self, max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the tensors in the order of `specs`; a bucket is valid until the next one is requested."""
        for group in split_into_buckets(self.specs(), max_bytes):
            names = [spec.name for spec in group]
            parameters = [self._parameters[name] for name in names]
            added = [delta for name in names if (delta := self._deltas.get(name))]
            with gathered([*parameters, *(p for delta in added for p in (delta.a, delta.b))]):
                yield {name: self._merged(name, p) for name, p in zip(names, parameters, strict=True)}

    def _merged(self, name: str, parameter: nn.Parameter) -> torch.Tensor:
        delta = self._deltas.get(name)
        return parameter.data if delta is None else delta.merge_into(parameter)


def gathered(parameters: list[nn.Parameter]) -> Any:
    """Return a context in which sharded parameters are whole on every rank."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded)
