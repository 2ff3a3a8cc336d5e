"""The trainer's weights whole and under their HF names, whatever ZeRO has done to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from vz_ray.weights.source import split
from vz_ray.weights.version import TensorSpec, dtype_name


class TrainerSource:
    """A `WeightSource` over the parameters of a HF model under DeepSpeed.

    Tied tensors appear once, under the embedding's name. Every rank must walk
    through `buckets` with the same `max_bytes`: under ZeRO-3 it gathers.
    """

    def __init__(self, hf: nn.Module) -> None:
        self._parameters = dict(hf.named_parameters())

    def specs(self) -> list[TensorSpec]:
        """Names, types and whole shapes; moves no data."""
        return [
            TensorSpec(name, dtype_name(p.dtype), tuple(getattr(p, "ds_shape", p.shape)))
            for name, p in self._parameters.items()
        ]

    def buckets(self, max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
        """The tensors, in `specs` order; a group is valid until the next one is asked for."""
        for group in split(self.specs(), max_bytes):
            parameters = [self._parameters[spec.name] for spec in group]
            with whole(parameters):
                yield {spec.name: p.data for spec, p in zip(group, parameters, strict=True)}


def whole(parameters: list[nn.Parameter]) -> Any:
    """A context in which sharded parameters are whole on every rank."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded)
