"""Sources of weights to publish."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from vz_ray.weight_sync.weight_version import TensorSpec, dtype_name


class WeightSource(Protocol):
    """All full tensors of a model under their HF names, each exactly once.

    Tied tensors appear once, under the name that HF saves (the embedding).
    """

    def specs(self) -> list[TensorSpec]:
        """Return names, dtypes and full shapes without digests. Moves no data."""
        ...

    def buckets(self, max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the tensors in `specs` order, in buckets of at most `max_bytes` or one tensor.

        A bucket is valid until the next one is requested. Under ZeRO-3 each bucket is gathered, so every
        rank must iterate.
        """
        ...


def split_into_buckets(specs: list[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """Split `specs` into buckets of at most `max_bytes` or one tensor, in order."""
    buckets: list[list[TensorSpec]] = []
    free_bytes = 0
    for spec in specs:
        if not buckets or spec.nbytes > free_bytes:
            buckets.append([])
            free_bytes = max_bytes
        buckets[-1].append(spec)
        free_bytes -= spec.nbytes
    return buckets


class ModuleSource:
    """Parameters of a plain torch module whose names are HF names.

    Args:
        module: The module.
        dtype: Cast the tensors to this dtype. Default: no cast.
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
        for bucket in split_into_buckets(self.specs(), max_bytes):
            yield {spec.name: parameters[spec.name].detach().to(self._dtype) for spec in bucket}
