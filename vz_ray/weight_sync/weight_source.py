"""Where published weights come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from vz_ray.weight_sync.weight_version import TensorSpec, dtype_name


class WeightSource(Protocol):
    """A model's tensors under their HF names, whole, each exactly once.

    Tied tensors appear once, under the name that HF saves (the embedding).
    """

    def specs(self) -> list[TensorSpec]:
        """Names, types and whole shapes, without digests; moves no data."""
        ...

    def buckets(self, max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
        """The tensors, in `specs` order, in groups of at most `max_bytes` (or of one tensor).

        A group is valid until the next one is asked for. Under ZeRO-3 this
        gathers, so every rank must walk through it.
        """
        ...


def split_into_buckets(specs: list[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """Cuts `specs` in groups of at most `max_bytes`, or of one tensor; keeps the order."""
    groups: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        if not groups or spec.nbytes > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(spec)
        room -= spec.nbytes
    return groups


class ModuleSource:
    """The parameters of a plain torch module whose names are HF names.

    Args:
        dtype: What the tensors are published as; by default as they are.
    """

    def __init__(self, module: torch.nn.Module, *, dtype: torch.dtype | None = None) -> None:
        self._module = module
        self._dtype = dtype

    def specs(self) -> list[TensorSpec]:
        return [
            TensorSpec(name, dtype_name(self._dtype or parameter.dtype), tuple(parameter.shape))
            for name, parameter in self._module.named_parameters()
        ]

    def buckets(self, max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
        parameters = dict(self._module.named_parameters())
        for group in split_into_buckets(self.specs(), max_bytes):
            yield {spec.name: parameters[spec.name].detach().to(self._dtype) for spec in group}
