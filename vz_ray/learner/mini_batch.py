"""Mini-batches of a GRPO step: the trajectories of an optimizer step with the constant inputs of their loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vz_ray.config.loss import LossConfig
from vz_ray.env.trajectory import Group, Trajectory
from vz_ray.learner.advantages import group_advantages, turns_with_loss
from vz_ray.learner.batch import MicroBatch
from vz_ray.learner.example import Example, teacher_logprobs
from vz_ray.learner.grpo_loss import LossInputs, loss_weights
from vz_ray.learner.packing import PrefixTree

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """The trajectories of one optimizer step.

    Attributes:
        trajectories: All trajectories, on every rank.
        examples: The trajectories as arrays.
        advantages: Of each example: `[1]`, or one per turn.
        loss_weights: Of each example, likewise; see `grpo_loss.loss_weights`.
        micro_batches: This rank's micro-batches, as trees of `examples`.
        teacher_logprobs: Of the sampled tokens of each example; None without a teacher.
    """

    trajectories: list[Trajectory]
    examples: list[Example]
    advantages: list[Floats]
    loss_weights: list[Floats]
    micro_batches: list[list[PrefixTree]]
    teacher_logprobs: list[Floats] | None

    def loss_inputs(self, batch: MicroBatch, old_logprobs: Tensor, ref_logprobs: Tensor | None) -> LossInputs:
        """Return the inputs of the loss of a micro-batch of this mini-batch, on its device.

        Args:
            old_logprobs: `[B, S]`.
            ref_logprobs: `[B, S]`; None without a reference model.
        """
        teacher = self.teacher_logprobs
        return LossInputs(
            advantages=self._per_token(batch, self.advantages),
            weights=self._per_token(batch, self.loss_weights),
            mask=batch.mask,
            old_logprobs=old_logprobs,
            engine_logprobs=batch.engine_logprobs,
            ref_logprobs=ref_logprobs,
            teacher_logprobs=None if teacher is None else _pad(batch, dict(enumerate(teacher))),
        )

    def _per_token(self, batch: MicroBatch, values: Sequence[Floats]) -> Tensor:
        """Return the values of the turns per token, `[B, S]`; `[B, 1]` if each example has one value."""
        if any(len(values[index]) > 1 for index in batch.indices):
            rows = {index: np.repeat(values[index], self.examples[index].turn_lengths) for index in batch.indices}
            return _pad(batch, rows)
        return _pad(batch, dict(enumerate(values)))


def build_mini_batches(
    groups: Sequence[Group],
    encode: Callable[[Sequence[Trajectory]], list[Example]],
    plan: Callable[[Sequence[Example]], list[list[PrefixTree]]],
    size: int,
    loss: LossConfig,
) -> list[MiniBatch]:
    """Split groups into mini-batches.

    Args:
        encode: Convert trajectories to arrays.
        plan: Return this rank's micro-batches of examples.
        size: Groups per mini-batch; the last one can be smaller.
    """
    mini_batches = []
    for start in range(0, len(groups), size):
        part = groups[start : start + size]
        trajectories = [trajectory for group in part for trajectory in group.trajectories]
        examples = encode(trajectories)
        unmasked = [turns_with_loss(trajectory, loss.mask_truncated) for trajectory in trajectories]
        lengths = [int((e.turn_lengths * turns).sum()) for e, turns in zip(examples, unmasked, strict=True)]
        weights = loss_weights(lengths, loss.aggregation, loss.fixed_length)
        mini_batches.append(
            MiniBatch(
                trajectories=trajectories,
                examples=examples,
                advantages=[values for group in part for values in group_advantages(group, loss)],
                loss_weights=[weight * turns for weight, turns in zip(weights, unmasked, strict=True)],
                micro_batches=plan(examples),
                teacher_logprobs=teacher_logprobs(trajectories, examples) if loss.teacher_coef else None,
            )
        )
    return mini_batches


def _pad(batch: MicroBatch, values: Mapping[int, Floats]) -> Tensor:
    """Return the rows of the micro-batch's examples, padded with 0; `[1, 1]` if it is empty."""
    rows = [values[index] for index in batch.indices] or [np.zeros(1)]
    padded = np.zeros((len(rows), max(map(len, rows))))
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return torch.tensor(padded, dtype=torch.float32, device=batch.mask.device)
