"""Float32 weights and Adam moments of this rank, for each ZeRO stage.

    stage 0     every rank holds all elements, in the parameters themselves
    stage 1, 2  a rank holds a contiguous range of all parameters, concatenated
    stage 3     a rank holds a contiguous range of each parameter; the last ranges are padded

Each rank reads and writes its own elements in place. Nothing is gathered.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vz_ray.learner.distributed import RankInfo
from vz_ray.learner.train_engine import TrainEngine

WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")


def identity(tensor: Tensor) -> Tensor:
    """Return the tensor: no state is offloaded."""
    return tensor


@dataclass(frozen=True, slots=True)
class ParamSlice:
    """A range of the elements of one flattened parameter.

    Attributes:
        name: HF name of the parameter.
        shape: Whole shape of the parameter.
        start: Index of the first element.
        stop: Index after the last element; greater than `start`.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def is_whole(self) -> bool:
        return self.stop - self.start == math.prod(self.shape)


class ZeroState(ABC):
    """Optimizer state of one rank.

    Args:
        on_host: Returns the elements of offloaded tensors, for `read`; see `StateOffloader.on_host`.

    Attributes:
        shapes: Whole shapes of all trained parameters by HF name; equal on every rank.
    """

    def __init__(
        self, engine: TrainEngine, rank_info: RankInfo, on_host: Callable[[Tensor], Tensor] = identity
    ) -> None:
        self._rank_info, self._on_host = rank_info, on_host
        self._zero_optimizer = engine.deepspeed.optimizer
        self._torch_optimizer = engine.deepspeed.basic_optimizer
        self._trained = trainable_parameters(engine.deepspeed.module)
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self._trained.items()}

    @abstractmethod
    def local_slices(self) -> list[ParamSlice]:
        """Return all slices that this rank holds."""

    def slices_to_save(self) -> list[ParamSlice]:
        """Return the slices that this rank saves: over all ranks, each element exactly once."""
        return self.local_slices()

    @abstractmethod
    def read(self, param: ParamSlice, kind: str) -> Tensor:
        """Return the float32 elements `[stop - start]` of `weights` or of an existing moment."""

    @abstractmethod
    def write(self, param: ParamSlice, kind: str, values: Tensor) -> None:
        """Set the elements of a slice; new weights take effect after `sync_model_weights`."""

    @abstractmethod
    def _flat_tensors(self) -> Iterable[Tensor]:
        """The tensors that the torch optimizer steps."""

    @abstractmethod
    def sync_model_weights(self) -> None:
        """Update the model's weights from the float32 weights; every rank must call."""

    @property
    def optimizer_steps(self) -> int:
        """Step count of the moments, used for bias correction; 0 without moments."""
        return max(
            (int(self._torch_optimizer.state.get(flat, {}).get("step", 0)) for flat in self._flat_tensors()),
            default=0,
        )

    def reset_moments(self, optimizer_steps: int) -> None:
        """Set all moments to 0 and their step count to `optimizer_steps`; call before the first `write`.

        Every rank must call.
        """
        for flat in self._flat_tensors():
            state = self._torch_optimizer.state[flat]
            for moment in MOMENTS:
                state[moment] = state[moment].zero_() if moment in state else torch.zeros_like(flat.detach())
            # The fused AdamW counts in a tensor on the device of the moments.
            state["step"] = torch.tensor(float(optimizer_steps), device=flat.device)


class Zero0State(ZeroState):
    """ZeRO 0 in float32: the parameters are the float32 weights. The ranks share the saving."""

    def local_slices(self) -> list[ParamSlice]:
        return [ParamSlice(name, shape, 0, math.prod(shape)) for name, shape in self.shapes.items()]

    def slices_to_save(self) -> list[ParamSlice]:
        slices, offset = [], 0
        total = sum(param.stop for param in self.local_slices())
        for param in self.local_slices():
            if offset * self._rank_info.world_size // total == self._rank_info.rank:
                slices.append(param)
            offset += param.stop
        return slices

    def read(self, param: ParamSlice, kind: str) -> Tensor:
        parameter = self._trained[param.name]
        if kind == WEIGHTS:
            return self._on_host(parameter.detach()).flatten()
        # A parameter without a gradient so far has no moments, even if others have.
        moment = self._torch_optimizer.state.get(parameter, {}).get(kind)
        return torch.zeros(param.stop) if moment is None else self._on_host(moment).flatten()

    def write(self, param: ParamSlice, kind: str, values: Tensor) -> None:
        parameter = self._trained[param.name]
        target = parameter.detach() if kind == WEIGHTS else self._torch_optimizer.state[parameter][kind]
        target.copy_(values.view(param.shape))

    def sync_model_weights(self) -> None:
        """Do nothing: the model computes with the float32 weights."""

    def _flat_tensors(self) -> Iterable[Tensor]:
        return self._trained.values()


class Zero12State(ZeroState):
    """ZeRO 1 and 2: a rank holds a range of the concatenated parameters of each parameter group."""

    def local_slices(self) -> list[ParamSlice]:
        slices = []
        for name, shape in self.shapes.items():
            mapping = self._mapping(name)
            if mapping is not None:
                address = mapping.lp_fragment_address
                slices.append(ParamSlice(name, shape, address.start, address.start + address.numel))
        return slices

    def read(self, param: ParamSlice, kind: str) -> Tensor:
        mapping = self._mapping(param.name)
        flat = self._torch_optimizer.param_groups[mapping.param_group_index]["params"][0]
        flat_values = flat.detach() if kind == WEIGHTS else self._torch_optimizer.state[flat][kind]
        address = mapping.hp_fragment_address
        return self._on_host(flat_values).narrow(0, address.start, address.numel)

    def write(self, param: ParamSlice, kind: str, values: Tensor) -> None:
        self.read(param, kind).copy_(values)

    def sync_model_weights(self) -> None:
        self._zero_optimizer.update_lp_params()

    def _mapping(self, name: str) -> Any:
        """Position of a parameter in the flat tensors; None if this rank holds no element."""
        return self._trained[name]._hp_mapping

    def _flat_tensors(self) -> Iterable[Tensor]:
        return [flat for group in self._torch_optimizer.param_groups for flat in group["params"]]


class Zero3State(ZeroState):
    """ZeRO 3: a rank holds a range of each parameter; all ranges of one parameter have equal length."""

    def local_slices(self) -> list[ParamSlice]:
        slices = []
        for name, shape in self.shapes.items():
            count, size = self._trained[name].ds_tensor.numel(), math.prod(shape)
            start = min(count * self._rank_info.rank, size)
            if start < size:
                slices.append(ParamSlice(name, shape, start, min(start + count, size)))
        return slices

    def read(self, param: ParamSlice, kind: str) -> Tensor:
        return self._read_padded(param.name, kind)[: param.stop - param.start]

    def write(self, param: ParamSlice, kind: str, values: Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        parameter = self._trained[param.name]
        padded = values.new_zeros(parameter.ds_tensor.numel())
        padded[: len(values)] = values
        if kind == WEIGHTS:
            safe_set_local_fp32_param(parameter, padded)
        else:
            safe_set_local_optimizer_state(parameter, padded, kind)

    def reset_moments(self, optimizer_steps: int) -> None:
        # Release gathered parameters: a whole copy would hide the new shards.
        self._zero_optimizer.checkpoint_event_prologue()
        super().reset_moments(optimizer_steps)

    def sync_model_weights(self) -> None:
        for name, parameter in self._trained.items():
            parameter.ds_tensor.data.copy_(self._read_padded(name, WEIGHTS))
        self._zero_optimizer.checkpoint_event_epilogue()

    def _read_padded(self, name: str, kind: str) -> Tensor:
        # DeepSpeed's `safe_get_local_*` copy to the device and cannot read offloaded tensors.
        zero = self._zero_optimizer
        group, start, count = zero.grad_position[zero.get_param_id(self._trained[name])]
        flat = zero.fp32_partitioned_groups_flat[group]
        flat_values = flat.detach() if kind == WEIGHTS else self._torch_optimizer.state[flat][kind]
        return self._on_host(flat_values).narrow(0, start, count)

    def _flat_tensors(self) -> Iterable[Tensor]:
        return self._zero_optimizer.fp32_partitioned_groups_flat


def create_zero_state(
    engine: TrainEngine, rank_info: RankInfo, on_host: Callable[[Tensor], Tensor] = identity
) -> ZeroState:
    """Return the state class that matches the engine's parameters; see `ZeroState`."""
    parameters = trainable_parameters(engine.deepspeed.module).values()
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        return Zero3State(engine, rank_info, on_host)
    if any(hasattr(parameter, "_hp_mapping") for parameter in parameters):
        return Zero12State(engine, rank_info, on_host)
    return Zero0State(engine, rank_info, on_host)


def trainable_parameters(module: nn.Module) -> dict[str, Any]:
    """Return the parameters that the optimizer updates, by HF name; tied parameters once."""
    return {
        name.removeprefix("hf."): parameter for name, parameter in module.named_parameters() if parameter.requires_grad
    }


def has_frozen_parameters(module: nn.Module) -> bool:
    """Return whether some parameters keep the values of the initial model."""
    return not all(parameter.requires_grad for parameter in module.parameters())
