"""The float32 weights and Adam moments that this rank holds, whatever ZeRO has made of them.

    stage 0     every rank holds everything, in the parameters themselves
    stage 1, 2  a rank holds a run of all parameters laid end to end
    stage 3     a rank holds a run of each parameter, the last ones padded

Nothing is gathered: each rank reads and writes its own elements in place.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vz_ray.learner.distributed import RankInfo
from vz_ray.learner.train_engine import TrainEngine

WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class ParamSlice:
    """Elements of one parameter, flattened row by row.

    Attributes:
        name: HF name of the parameter.
        shape: Its whole shape.
        start: First element.
        stop: One beyond the last; above `start`.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def is_whole(self) -> bool:
        return self.stop - self.start == math.prod(self.shape)


class ZeroState(ABC):
    """What the optimizer keeps, on one rank.

    Attributes:
        shapes: Whole shapes of all trained parameters by HF name, on every rank alike.
    """

    def __init__(self, engine: TrainEngine, place: RankInfo) -> None:
        self._place = place
        self._zero, self._base = engine.deepspeed.optimizer, engine.deepspeed.basic_optimizer
        self._trained = trainable_parameters(engine.deepspeed.module)
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self._trained.items()}

    @abstractmethod
    def local_slices(self) -> list[ParamSlice]:
        """All that this rank holds."""

    def slices_to_save(self) -> list[ParamSlice]:
        """Those that this rank saves: over all ranks, each element once."""
        return self.local_slices()

    @abstractmethod
    def read(self, piece: ParamSlice, kind: str) -> Tensor:
        """Float32 elements `[stop - start]` of `weights` or of a moment, which must exist."""

    @abstractmethod
    def write(self, piece: ParamSlice, kind: str, values: Tensor) -> None:
        """Undoes `read`; the weights are in use after `sync_model_weights`."""

    @abstractmethod
    def _flat_tensors(self) -> Iterable[Tensor]:
        """The tensors that the torch optimizer steps."""

    @abstractmethod
    def sync_model_weights(self) -> None:
        """Makes the weights that the model computes with from their masters; every rank must call."""

    @property
    def optimizer_steps(self) -> int:
        """Updates that the moments have seen, which correct their bias; 0 if there are no moments."""
        return max(
            (int(self._base.state.get(flat, {}).get("step", 0)) for flat in self._flat_tensors()), default=0
        )

    def reset_moments(self, updates: int) -> None:
        """Sets all moments to 0, and the number of updates that they have seen; comes before the first `write`.

        Every rank must call.
        """
        for flat in self._flat_tensors():
            state = self._base.state[flat]
            for moment in MOMENTS:
                state[moment] = state[moment].zero_() if moment in state else torch.zeros_like(flat.detach())
            # torch counts in a tensor; DeepSpeed's own optimizers count in an int.
            is_torch = isinstance(self._base, torch.optim.AdamW)
            state["step"] = torch.tensor(float(updates)) if is_torch else updates


class Zero0State(ZeroState):
    """ZeRO 0 in float32: the parameters are their own masters. Ranks share the saving."""

    def local_slices(self) -> list[ParamSlice]:
        return [ParamSlice(name, shape, 0, math.prod(shape)) for name, shape in self.shapes.items()]

    def slices_to_save(self) -> list[ParamSlice]:
        pieces, before = [], 0
        total = sum(piece.stop for piece in self.local_slices())
        for piece in self.local_slices():
            if before * self._place.world_size // total == self._place.rank:
                pieces.append(piece)
            before += piece.stop
        return pieces

    def read(self, piece: ParamSlice, kind: str) -> Tensor:
        parameter = self._trained[piece.name]
        if kind == WEIGHTS:
            return parameter.detach().flatten()
        # A parameter that has not had a gradient yet has no moments, whatever the others have.
        moment = self._base.state.get(parameter, {}).get(kind)
        return torch.zeros(piece.stop) if moment is None else moment.flatten()

    def write(self, piece: ParamSlice, kind: str, values: Tensor) -> None:
        parameter = self._trained[piece.name]
        target = parameter.detach() if kind == WEIGHTS else self._base.state[parameter][kind]
        target.copy_(values.view(piece.shape))

    def sync_model_weights(self) -> None:
        """Nothing to do: the model computes with the masters."""

    def _flat_tensors(self) -> Iterable[Tensor]:
        return self._trained.values()


class Zero12State(ZeroState):
    """ZeRO 1 and 2: masters are a run of each group's parameters, laid end to end."""

    def local_slices(self) -> list[ParamSlice]:
        pieces = []
        for name, shape in self.shapes.items():
            mapping = self._mapping(name)
            if mapping is not None:
                address = mapping.lp_fragment_address
                pieces.append(ParamSlice(name, shape, address.start, address.start + address.numel))
        return pieces

    def read(self, piece: ParamSlice, kind: str) -> Tensor:
        mapping = self._mapping(piece.name)
        flat = self._base.param_groups[mapping.param_group_index]["params"][0]
        whole = flat.detach() if kind == WEIGHTS else self._base.state[flat][kind]
        address = mapping.hp_fragment_address
        part: Tensor = whole.narrow(0, address.start, address.numel)
        return part

    def write(self, piece: ParamSlice, kind: str, values: Tensor) -> None:
        self.read(piece, kind).copy_(values)

    def sync_model_weights(self) -> None:
        self._zero.update_lp_params()

    def _mapping(self, name: str) -> Any:
        """Where the masters of a parameter lie within the flat ones; None if this rank has none of it."""
        return self._trained[name]._hp_mapping

    def _flat_tensors(self) -> Iterable[Tensor]:
        return [flat for group in self._base.param_groups for flat in group["params"]]


class Zero3State(ZeroState):
    """ZeRO 3: masters are this rank's run of each parameter; all runs of one are equally long."""

    def local_slices(self) -> list[ParamSlice]:
        pieces = []
        for name, shape in self.shapes.items():
            count, size = self._trained[name].ds_tensor.numel(), math.prod(shape)
            start = min(count * self._place.rank, size)
            if start < size:
                pieces.append(ParamSlice(name, shape, start, min(start + count, size)))
        return pieces

    def read(self, piece: ParamSlice, kind: str) -> Tensor:
        return self._padded(piece.name, kind)[: piece.stop - piece.start]

    def write(self, piece: ParamSlice, kind: str, values: Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        parameter = self._trained[piece.name]
        padded = values.new_zeros(parameter.ds_tensor.numel())
        padded[: len(values)] = values
        if kind == WEIGHTS:
            safe_set_local_fp32_param(parameter, padded)
        else:
            safe_set_local_optimizer_state(parameter, padded, kind)

    def reset_moments(self, updates: int) -> None:
        self._zero.checkpoint_event_prologue()  # no weights stay whole while their parts change
        super().reset_moments(updates)

    def sync_model_weights(self) -> None:
        for name, parameter in self._trained.items():
            parameter.ds_tensor.data.copy_(self._padded(name, WEIGHTS))
        self._zero.checkpoint_event_epilogue()

    def _padded(self, name: str, kind: str) -> Tensor:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        parameter = self._trained[name]
        found = (
            safe_get_local_fp32_param(parameter)
            if kind == WEIGHTS
            else safe_get_local_optimizer_state(parameter, kind)
        )
        run: Tensor = found.detach()
        return run

    def _flat_tensors(self) -> Iterable[Tensor]:
        flats: list[Tensor] = self._zero.fp32_partitioned_groups_flat
        return flats


def create_zero_state(engine: TrainEngine, place: RankInfo) -> ZeroState:
    """The masters of an engine, by what its optimizer has made of the parameters."""
    parameters = trainable_parameters(engine.deepspeed.module).values()
    if any(hasattr(p, "ds_id") for p in parameters):
        return Zero3State(engine, place)
    if any(hasattr(p, "_hp_mapping") for p in parameters):
        return Zero12State(engine, place)
    return Zero0State(engine, place)


def trainable_parameters(module: nn.Module) -> dict[str, Any]:
    """The parameters that the optimizer moves, by HF name; a tied one once."""
    return {name.removeprefix("hf."): p for name, p in module.named_parameters() if p.requires_grad}


def has_frozen_parameters(module: nn.Module) -> bool:
    """Whether some parameters stay as the initial model has them."""
    return not all(p.requires_grad for p in module.parameters())
