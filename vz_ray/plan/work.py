"""Arithmetic of the learner: of one trajectory, of one iteration, and how long that takes."""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.plan.budget import EpisodeBudget
from vz_ray.plan.flops import (
    BACKWARD,
    causal_pairs,
    head_flops,
    packed_pairs,
    text_flops,
    vision_flops,
    vision_pairs,
)
from vz_ray.plan.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Forward:
    """Floating point operations of one forward pass, by part of the model."""

    text: int
    """The language model's matrices."""
    attention: int
    """Of the language model: queries times keys, weights times values."""
    vision: int
    head: int

    @classmethod
    def of(cls, shape: ModelShape, tokens: int, pairs: int, vision: int, sampled: int) -> Forward:
        """See `text_flops` and `head_flops`; `vision` are operations."""
        return cls(
            text_flops(shape, tokens, 0), text_flops(shape, 0, pairs), vision, head_flops(shape, sampled)
        )

    def __add__(self, other: Forward) -> Forward:
        return Forward(
            self.text + other.text,
            self.attention + other.attention,
            self.vision + other.vision,
            self.head + other.head,
        )

    def __mul__(self, times: int) -> Forward:
        return Forward(self.text * times, self.attention * times, self.vision * times, self.head * times)

    @property
    def flops(self) -> int:
        return self.text + self.attention + self.vision + self.head


@dataclass(frozen=True, slots=True)
class Passes:
    """How often a batch goes through a model.

    Attributes:
        updates: Forward and backward passes: epochs.
        scores: Forward passes alone: old log-probs, the reference model's.
        checkpointing: Layers are computed again in the backward pass.
        text: Forward passes that the backward pass of the language model's matrices and of `lm_head` is
            worth: `BACKWARD`, or `THROUGH` where adapters alone are trained.
        vision: The same of the tower; 0 where nothing in it is trained.
    """

    updates: int
    scores: int
    checkpointing: bool
    text: int = BACKWARD
    vision: int = BACKWARD

    def model_flops(self, forward: Forward) -> int:
        """Without what is computed twice: what model flops utilisation is about."""
        return self._flops(forward, again=0, logits_again=0)

    def executed_flops(self, forward: Forward) -> int:
        """With what gradient checkpointing and chunked logits compute again."""
        return self._flops(forward, again=int(self.checkpointing), logits_again=1)

    def _flops(self, forward: Forward, again: int, logits_again: int) -> int:
        update = forward.text * (1 + self.text + again)
        update += forward.attention * (1 + BACKWARD + again)
        update += forward.vision * (1 + self.vision + again if self.vision else 1)
        update += forward.head * (1 + self.text + logits_again)
        return self.updates * update + self.scores * forward.flops


@dataclass(frozen=True, slots=True)
class Work:
    """The learner's arithmetic for a batch of trajectories.

    Attributes:
        tokens: That go through the language model in one forward pass.
        model_flops: See `Passes.model_flops`.
        executed_flops: See `Passes.executed_flops`.
        per_trajectory: Of `executed_flops`.
        seconds: At the assumed rate.
    """

    tokens: int
    model_flops: int
    executed_flops: int
    per_trajectory: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Rate:
    """What the learner's GPUs do.

    Attributes:
        ranks: GPUs.
        peak: Operations a second of one, as its maker says.
        mfu: Share of the peak that is reached, what is computed twice counted in.
    """

    ranks: int
    peak: float
    mfu: float

    def seconds(self, flops: int) -> float:
        return flops / (self.ranks * self.peak * self.mfu)


def alone(shape: ModelShape, episode: EpisodeBudget) -> Forward:
    """One trajectory as a sequence of its own."""
    vision = _frames(shape, episode, episode.frames)
    return Forward.of(shape, episode.tokens, causal_pairs(episode.tokens), vision, episode.sampled)


def packed(shape: ModelShape, episode: EpisodeBudget, branches: int) -> Forward:
    """Trajectories of one task as one sequence: prompt and overview once, then each one's own tokens."""
    pairs = packed_pairs(episode.prefix, [episode.branch] * branches)
    tokens = episode.prefix + branches * episode.branch
    vision = _frames(shape, episode, episode.overview_frames + branches * episode.zoom_frames)
    return Forward.of(shape, tokens, pairs, vision, branches * episode.sampled)


def _frames(shape: ModelShape, episode: EpisodeBudget, frames: int) -> int:
    pairs = vision_pairs(shape.vision, episode.frame.rows, episode.frame.columns)
    return vision_flops(shape, frames * episode.frame.patches, frames * pairs)


def packs(episode: EpisodeBudget, samples: int, budget: int) -> list[int]:
    """Branches of each sequence that a group is split into, as few as are no longer than `budget`."""
    most = max(1, (budget - episode.prefix) // max(1, episode.branch))
    count = -(-samples // most)
    return [samples // count + (index < samples % count) for index in range(count)]


def one_by_one(
    shape: ModelShape, episode: EpisodeBudget, trajectories: int, passes: Passes, rate: Rate
) -> Work:
    """Every trajectory as a sequence of its own."""
    forward = alone(shape, episode) * trajectories
    return _work(forward, trajectories * episode.tokens, trajectories, passes, rate)


def with_shared_prefixes(
    shape: ModelShape,
    episode: EpisodeBudget,
    groups: int,
    samples: int,
    budget: int,
    passes: Passes,
    rate: Rate,
) -> Work:
    """The samples of a group as few sequences, of at most `budget` tokens, with its prefix in each once."""
    split = packs(episode, samples, budget)
    forward = Forward(0, 0, 0, 0)
    for branches in split:
        forward = forward + packed(shape, episode, branches)
    tokens = groups * (len(split) * episode.prefix + samples * episode.branch)
    return _work(forward * groups, tokens, groups * samples, passes, rate)


def _work(forward: Forward, tokens: int, trajectories: int, passes: Passes, rate: Rate) -> Work:
    executed = passes.executed_flops(forward)
    return Work(
        tokens=tokens,
        model_flops=passes.model_flops(forward),
        executed_flops=executed,
        per_trajectory=executed // trajectories,
        seconds=rate.seconds(executed),
    )
