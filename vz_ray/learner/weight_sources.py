"""Whole weights of a model under DeepSpeed, for publishes and exports: all weights, or the adapters alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vz_ray.learner.lora import base_parameter_name, lora_deltas
from vz_ray.learner.state_offload import StateOffloader
from vz_ray.weight_sync.weight_source import StoredLayout, split_into_buckets
from vz_ray.weight_sync.weight_version import ADAPTER_PARTS, TensorSpec, dtype_name

WholeTensors: TypeAlias = Mapping[nn.Parameter, Tensor]
"""Whole tensor of each parameter."""


class ZeroSource(ABC):
    """`WeightSource` over whole tensors computed from parameters under DeepSpeed, for every ZeRO stage.

    Every rank must iterate over `buckets` with the same `max_bytes`: under ZeRO-3 each bucket is gathered.

    Args:
        hf: The HF model.
        inputs: Parameters of each tensor, by name. Shape and dtype are those of the first.
        offloader: Reads weights in host memory while they are offloaded; None if they never are.
    """

    def __init__(
        self, hf: nn.Module, inputs: Mapping[str, tuple[nn.Parameter, ...]], offloader: StateOffloader | None
    ) -> None:
        self._inputs, self._offloader, self._layout = inputs, offloader, StoredLayout(hf)

    @abstractmethod
    def compute(self, name: str, whole: WholeTensors) -> Tensor:
        """Return a tensor from its whole parameters."""

    def specs(self) -> list[TensorSpec]:
        """Return names, dtypes and whole shapes, without moving data."""
        return [
            TensorSpec(
                name,
                dtype_name(first.dtype),
                self._layout.shape(name, tuple(getattr(first, "ds_shape", first.shape))),
            )
            for name, (first, *_) in self._inputs.items()
        ]

    def buckets(self, max_bytes: int) -> Iterator[dict[str, Tensor]]:
        """Yield the tensors in the order of `specs`; a bucket is valid until the next one is requested."""
        for group in split_into_buckets(self.specs(), max_bytes):
            names = [spec.name for spec in group]
            with _whole([p for name in names for p in self._inputs[name]], self._offloader) as whole:
                yield {name: self._layout.tensor(name, self.compute(name, whole)) for name in names}


class ZeroWeightSource(ZeroSource):
    """All weights of an HF model under their HF names; tied tensors once, under the embedding's name.

    Adapters are merged into copies of the weights; the trained parameters do not change. See `learner/lora.py`.

    Args:
        hf: The HF model.
        offloader: See `ZeroSource`.
    """

    def __init__(self, hf: nn.Module, offloader: StateOffloader | None = None) -> None:
        named = ((base_parameter_name(name), parameter) for name, parameter in hf.named_parameters())
        self._deltas = lora_deltas(hf)
        inputs = {
            name: (parameter, delta.a, delta.b) if (delta := self._deltas.get(name)) else (parameter,)
            for name, parameter in named
            if name is not None
        }
        super().__init__(hf, inputs, offloader)

    def compute(self, name: str, whole: WholeTensors) -> Tensor:
        weight, delta = whole[self._inputs[name][0]], self._deltas.get(name)
        if delta is None:
            return weight
        return replace(delta, a=whole[delta.a], b=whole[delta.b]).merge_into(weight)


class AdapterSource(ZeroSource):
    """The adapters of an HF model: A `[r, in]` and B `[out, r]` of each adapted layer.

    Example: `model.language_model.layers.0.mlp.up_proj.lora_A.weight`. B is multiplied by the adapter's scale, so
    that an engine adds B A x.

    Args:
        hf: The HF model with adapters.
        offloader: See `ZeroSource`.
    """

    def __init__(self, hf: nn.Module, offloader: StateOffloader | None = None) -> None:
        part_a, part_b = ADAPTER_PARTS
        inputs: dict[str, tuple[nn.Parameter, ...]] = {}
        self._scales: dict[str, float] = {}
        for weight, delta in lora_deltas(hf).items():
            layer = weight.removesuffix(".weight")
            inputs |= {layer + part_a: (delta.a,), layer + part_b: (delta.b,)}
            self._scales[layer + part_b] = delta.scale
        super().__init__(hf, inputs, offloader)

    def compute(self, name: str, whole: WholeTensors) -> Tensor:
        tensor = whole[self._inputs[name][0]].detach()
        return tensor * self._scales[name] if name in self._scales else tensor


@contextmanager
def _whole(parameters: list[nn.Parameter], offloader: StateOffloader | None) -> Iterator[WholeTensors]:
    """Yield the whole tensor of each parameter, on the device or in host memory."""
    if offloader is not None and offloader.has_weights_on_host:
        yield {p: _gather_on_host(p, offloader) for p in parameters}
        return
    with gathered(parameters):
        yield {p: p.data for p in parameters}


def _gather_on_host(parameter: Any, offloader: StateOffloader) -> Tensor:
    """Return a parameter whose storage is in host memory; under ZeRO-3 every rank must call."""
    if not hasattr(parameter, "ds_id"):
        return offloader.on_host(parameter.data)
    shard = offloader.on_host(parameter.ds_tensor).cpu()
    shards = [shard]
    if dist.is_initialized() and (world_size := dist.get_world_size()) > 1:
        shards = [torch.empty_like(shard) for _ in range(world_size)]
        dist.all_gather([part.view(torch.uint8) for part in shards], shard.view(torch.uint8))
    return torch.cat(shards)[: parameter.ds_numel].view(parameter.ds_shape)


def gathered(parameters: list[nn.Parameter]) -> Any:
    """Return a context in which sharded parameters are whole on every rank."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded)
