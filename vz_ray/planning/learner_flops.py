"""Arithmetic of the learner: of one trajectory, of one iteration, and how long that takes."""

from __future__ import annotations

from dataclasses import dataclass

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
from vz_ray.planning.model_shape import ModelShape


@dataclass(frozen=True, slots=True)
class ForwardFlops:
    """Floating point operations of one forward pass, by part of the model."""

    text: int
    """The language model's matrices."""
    attention: int
    """Of the language model: queries times keys, weights times values."""
    vision: int
    head: int

    @classmethod
    def compute(cls, shape: ModelShape, tokens: int, pairs: int, vision: int, sampled: int) -> ForwardFlops:
        """See `text_flops` and `head_flops`; `vision` are operations."""
        return cls(
            text_flops(shape, tokens, 0), text_flops(shape, 0, pairs), vision, head_flops(shape, sampled)
        )

    def __add__(self, other: ForwardFlops) -> ForwardFlops:
        return ForwardFlops(
            self.text + other.text,
            self.attention + other.attention,
            self.vision + other.vision,
            self.head + other.head,
        )

    def __mul__(self, times: int) -> ForwardFlops:
        return ForwardFlops(self.text * times, self.attention * times, self.vision * times, self.head * times)

    @property
    def total(self) -> int:
        return self.text + self.attention + self.vision + self.head


@dataclass(frozen=True, slots=True)
class PassCounts:
    """How often a batch goes through a model.

    Attributes:
        updates: Forward and backward passes: epochs.
        forward_only: Forward passes alone: old log-probs, the reference model's.
        checkpointing: Layers are computed again in the backward pass.
        text_backward_factor: Forward passes that the backward pass of the language model's matrices and of `lm_head` is
            worth: `BACKWARD_FACTOR`, or `FROZEN_BACKWARD_FACTOR` where adapters alone are trained.
        vision_backward_factor: The same of the tower; 0 where nothing in it is trained.
    """

    updates: int
    forward_only: int
    checkpointing: bool
    text_backward_factor: int = BACKWARD_FACTOR
    vision_backward_factor: int = BACKWARD_FACTOR

    def model_flops(self, forward: ForwardFlops) -> int:
        """Without what is computed twice: what model flops utilisation is about."""
        return self._flops(forward, again=0, logits_again=0)

    def executed_flops(self, forward: ForwardFlops) -> int:
        """With what gradient checkpointing and chunked logits compute again."""
        return self._flops(forward, again=int(self.checkpointing), logits_again=1)

    def _flops(self, forward: ForwardFlops, again: int, logits_again: int) -> int:
        update = forward.text * (1 + self.text_backward_factor + again)
        update += forward.attention * (1 + BACKWARD_FACTOR + again)
        update += forward.vision * (
            1 + self.vision_backward_factor + again if self.vision_backward_factor else 1
        )
        update += forward.head * (1 + self.text_backward_factor + logits_again)
        return self.updates * update + self.forward_only * forward.total


@dataclass(frozen=True, slots=True)
class LearnerWork:
    """The learner's arithmetic for a batch of trajectories.

    Attributes:
        tokens: That go through the language model in one forward pass.
        model_flops: See `PassCounts.model_flops`.
        executed_flops: See `PassCounts.executed_flops`.
        per_trajectory: Of `executed_flops`.
        seconds: At the assumed rate.
    """

    tokens: int
    model_flops: int
    executed_flops: int
    per_trajectory: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ComputeRate:
    """What the learner's GPUs do.

    Attributes:
        num_gpus: GPUs.
        peak_flops: Operations a second of one, as its maker says.
        mfu: Share of the peak that is reached, what is computed twice counted in.
    """

    num_gpus: int
    peak_flops: float
    mfu: float

    def seconds(self, flops: int) -> float:
        return flops / (self.num_gpus * self.peak_flops * self.mfu)


def unpacked_forward(shape: ModelShape, episode: EpisodeBudget) -> ForwardFlops:
    """One trajectory as a sequence of its own."""
    vision = _frames(shape, episode, episode.frames)
    return ForwardFlops.compute(
        shape, episode.tokens, causal_pairs(episode.tokens), vision, episode.sampled_tokens
    )


def packed_forward(shape: ModelShape, episode: EpisodeBudget, branches: int) -> ForwardFlops:
    """Trajectories of one task as one sequence: prompt and overview once, then each one's own tokens."""
    pairs = packed_pairs(episode.prefix_tokens, [episode.branch_tokens] * branches)
    tokens = episode.prefix_tokens + branches * episode.branch_tokens
    vision = _frames(shape, episode, episode.overview_frames + branches * episode.zoom_frames)
    return ForwardFlops.compute(shape, tokens, pairs, vision, branches * episode.sampled_tokens)


def _frames(shape: ModelShape, episode: EpisodeBudget, frames: int) -> int:
    pairs = vision_pairs(shape.vision, episode.frame.rows, episode.frame.columns)
    return vision_flops(shape, frames * episode.frame.patches, frames * pairs)


def split_group(episode: EpisodeBudget, samples: int, budget: int) -> list[int]:
    """Branches of each sequence that a group is split into, as few as are no longer than `budget`."""
    most = max(1, (budget - episode.prefix_tokens) // max(1, episode.branch_tokens))
    count = -(-samples // most)
    return [samples // count + (index < samples % count) for index in range(count)]


def unpacked_work(
    shape: ModelShape, episode: EpisodeBudget, trajectories: int, passes: PassCounts, rate: ComputeRate
) -> LearnerWork:
    """Every trajectory as a sequence of its own."""
    forward = unpacked_forward(shape, episode) * trajectories
    return _work(forward, trajectories * episode.tokens, trajectories, passes, rate)


def packed_work(
    shape: ModelShape,
    episode: EpisodeBudget,
    groups: int,
    samples: int,
    budget: int,
    passes: PassCounts,
    rate: ComputeRate,
) -> LearnerWork:
    """The samples of a group as few sequences, of at most `budget` tokens, with its prefix in each once."""
    split = split_group(episode, samples, budget)
    forward = ForwardFlops(0, 0, 0, 0)
    for branches in split:
        forward = forward + packed_forward(shape, episode, branches)
    tokens = groups * (len(split) * episode.prefix_tokens + samples * episode.branch_tokens)
    return _work(forward * groups, tokens, groups * samples, passes, rate)


def _work(
    forward: ForwardFlops, tokens: int, trajectories: int, passes: PassCounts, rate: ComputeRate
) -> LearnerWork:
    executed = passes.executed_flops(forward)
    return LearnerWork(
        tokens=tokens,
        model_flops=passes.model_flops(forward),
        executed_flops=executed,
        per_trajectory=executed // trajectories,
        seconds=rate.seconds(executed),
    )
