"""Copy of the trained state in host memory, to return to the state before a step of several updates."""

from __future__ import annotations

import torch
from torch import Tensor

from vz_ray.learner.distributed import RankInfo
from vz_ray.learner.train_engine import TrainEngine
from vz_ray.learner.zero_state import MOMENTS, WEIGHTS, create_zero_state


class StepSnapshot:
    """This rank's float32 weights, moments and step counts: 12 bytes per parameter that it holds.

    The buffers are pinned on GPUs and kept for the next step.
    """

    def __init__(self, engine: TrainEngine, rank_info: RankInfo) -> None:
        self._engine, self._rank_info = engine, rank_info
        self._buffers: dict[tuple[str, int, str], Tensor] = {}
        self._steps = self._updates = 0

    def take(self) -> None:
        """Copy the current state."""
        zero_state = create_zero_state(self._engine, self._rank_info)
        self._steps, self._updates = self._engine.steps, zero_state.optimizer_steps
        for kind in self._kinds():
            for param in zero_state.local_slices():
                values = zero_state.read(param, kind)
                key = (param.name, param.start, kind)
                if key not in self._buffers:
                    self._buffers[key] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
                self._buffers[key].copy_(values, non_blocking=True)
        if self._rank_info.device.type == "cuda":
            torch.cuda.synchronize(self._rank_info.device)

    def restore(self) -> None:
        """Return to the copied state; every rank must call."""
        zero_state = create_zero_state(self._engine, self._rank_info)
        zero_state.reset_moments(self._updates)
        for kind in self._kinds():
            for param in zero_state.local_slices():
                buffer = self._buffers[param.name, param.start, kind]
                zero_state.write(param, kind, buffer.to(self._rank_info.device))
        zero_state.sync_model_weights()
        self._engine.steps = self._steps

    def _kinds(self) -> tuple[str, ...]:
        return (WEIGHTS, *MOMENTS) if self._updates else (WEIGHTS,)
