"""FLOPs and time of the learner, per trajectory and per step."""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.families import ModelShape
from vz_ray.planning.episode_budget import EpisodeBudget
from vz_ray.planning.model_flops import (
    BACKWARD_FACTOR,
    causal_pairs,
    head_flops,
    packed_pairs,
    text_flops,
    vision_flops,
    vision_pairs,
)


@dataclass(frozen=True, slots=True)
class ForwardFlops:
    """FLOPs of one forward pass by part of the model.

    Attributes:
        text: Matrices of the language model.
        attention: Attention of the language model: scores and weighted values.
        vision: Vision tower and merger.
        head: `lm_head`.
    """

    text: int
    attention: int
    vision: int
    head: int

    @classmethod
    def compute(cls, shape: ModelShape, tokens: int, pairs: int, vision: int, sampled_tokens: int) -> ForwardFlops:
        """Create from `tokens`, attention `pairs`, FLOPs of the vision tower and tokens with log-probs."""
        return cls(
            text=text_flops(shape, tokens, 0),
            attention=text_flops(shape, 0, pairs),
            vision=vision,
            head=head_flops(shape, sampled_tokens),
        )

    def __add__(self, other: ForwardFlops) -> ForwardFlops:
        return ForwardFlops(
            self.text + other.text,
            self.attention + other.attention,
            self.vision + other.vision,
            self.head + other.head,
        )

    def __mul__(self, count: int) -> ForwardFlops:
        return ForwardFlops(self.text * count, self.attention * count, self.vision * count, self.head * count)

    @property
    def total(self) -> int:
        return self.text + self.attention + self.vision + self.head


@dataclass(frozen=True, slots=True)
class PassCounts:
    """Number of passes of a batch through the model.

    Attributes:
        updates: Forward and backward passes (epochs).
        forward_only: Forward passes without backward: old log-probs, reference model.
        checkpointing: Whether the backward pass recomputes layers.
        text_backward_factor: Backward FLOPs of text matrices and `lm_head`, in forward passes:
            `BACKWARD_FACTOR`, or `FROZEN_BACKWARD_FACTOR` if only adapters are trained.
        vision_backward_factor: The same for the vision tower; 0 if it is frozen.
        vision_slices: Whether frames pass a trained vision tower in slices, each of which is recomputed.
        tiled_share: Fraction of the text matrices' FLOPs in tiles that the backward pass computes again; 0 with
            `checkpointing`, which then does not recompute the MLPs.
    """

    updates: int
    forward_only: int
    checkpointing: bool
    text_backward_factor: int = BACKWARD_FACTOR
    vision_backward_factor: int = BACKWARD_FACTOR
    vision_slices: bool = False
    tiled_share: float = 0.0

    def model_flops(self, forward: ForwardFlops) -> int:
        """Return FLOPs without recomputation, the numerator of model FLOPs utilization."""
        return self._flops(forward)

    def executed_flops(self, forward: ForwardFlops) -> int:
        """Return FLOPs including recomputation by gradient checkpointing and chunked logits."""
        tiles = round(self.tiled_share * forward.text)
        flops = self._flops(forward, int(self.checkpointing), int(self.vision_slices), recomputed_logits=1)
        return flops + self.updates * tiles

    def _flops(
        self, forward: ForwardFlops, recomputed_layers: int = 0, recomputed_slices: int = 0, recomputed_logits: int = 0
    ) -> int:
        vision_passes = 1
        if self.vision_backward_factor:
            vision_passes += self.vision_backward_factor + recomputed_layers + recomputed_slices
        update = forward.text * (1 + self.text_backward_factor + recomputed_layers)
        update += forward.attention * (1 + BACKWARD_FACTOR + recomputed_layers)
        update += forward.vision * vision_passes
        update += forward.head * (1 + self.text_backward_factor + recomputed_logits)
        return self.updates * update + self.forward_only * forward.total


@dataclass(frozen=True, slots=True)
class LearnerWork:
    """FLOPs and time of a batch of trajectories.

    Attributes:
        tokens: Tokens of one forward pass through the language model.
        model_flops: See `PassCounts.model_flops`.
        executed_flops: See `PassCounts.executed_flops`.
        per_trajectory: `executed_flops` per trajectory.
        seconds: Time at the assumed compute rate.
    """

    tokens: int
    model_flops: int
    executed_flops: int
    per_trajectory: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ComputeRate:
    """Compute rate of the learner's GPUs.

    Attributes:
        num_gpus: Number of GPUs.
        peak_flops: Peak FLOPs per second of one GPU, from its data sheet.
        mfu: Fraction of the peak that is reached, recomputation included.
    """

    num_gpus: int
    peak_flops: float
    mfu: float

    def seconds(self, flops: int) -> float:
        return flops / (self.num_gpus * self.peak_flops * self.mfu)


def unpacked_forward(shape: ModelShape, episode: EpisodeBudget) -> ForwardFlops:
    """Return the FLOPs of one trajectory as its own sequence."""
    vision = _vision(shape, episode, episode.frames)
    pairs = causal_pairs(episode.tokens)
    return ForwardFlops.compute(shape, episode.tokens, pairs, vision, episode.sampled_tokens)


def packed_forward(shape: ModelShape, episode: EpisodeBudget, branches: int) -> ForwardFlops:
    """Return the FLOPs of trajectories of one task as one sequence with a shared prefix."""
    pairs = packed_pairs(episode.prefix_tokens, [episode.branch_tokens] * branches)
    tokens = episode.prefix_tokens + branches * episode.branch_tokens
    vision = _vision(shape, episode, episode.overview_frames + branches * episode.zoom_frames)
    return ForwardFlops.compute(shape, tokens, pairs, vision, branches * episode.sampled_tokens)


def _vision(shape: ModelShape, episode: EpisodeBudget, frames: int) -> int:
    pairs = vision_pairs(shape.vision, episode.frame.rows, episode.frame.columns)
    return vision_flops(shape, frames * episode.frame.patches, frames * pairs)


def split_group(episode: EpisodeBudget, group_size: int, max_tokens: int) -> list[int]:
    """Split a group into the fewest sequences of at most `max_tokens`; return the branches of each."""
    max_branches = max(1, (max_tokens - episode.prefix_tokens) // max(1, episode.branch_tokens))
    count = -(-group_size // max_branches)
    return [group_size // count + (index < group_size % count) for index in range(count)]


def unpacked_work(
    shape: ModelShape, episode: EpisodeBudget, trajectories: int, passes: PassCounts, rate: ComputeRate
) -> LearnerWork:
    """Return the work of a batch with one sequence per trajectory."""
    forward = unpacked_forward(shape, episode) * trajectories
    return _work(forward, trajectories * episode.tokens, trajectories, passes, rate)


def packed_work(
    shape: ModelShape,
    episode: EpisodeBudget,
    batch_size: int,
    group_size: int,
    max_tokens: int,
    passes: PassCounts,
    rate: ComputeRate,
) -> LearnerWork:
    """Return the work of `batch_size` groups in packed sequences of at most `max_tokens`."""
    sequences = split_group(episode, group_size, max_tokens)
    forward = ForwardFlops(0, 0, 0, 0)
    for branches in sequences:
        forward = forward + packed_forward(shape, episode, branches)
    tokens = batch_size * (len(sequences) * episode.prefix_tokens + group_size * episode.branch_tokens)
    return _work(forward * batch_size, tokens, batch_size * group_size, passes, rate)


def _work(forward: ForwardFlops, tokens: int, trajectories: int, passes: PassCounts, rate: ComputeRate) -> LearnerWork:
    executed = passes.executed_flops(forward)
    return LearnerWork(
        tokens=tokens,
        model_flops=passes.model_flops(forward),
        executed_flops=executed,
        per_trajectory=executed // trajectories,
        seconds=rate.seconds(executed),
    )
