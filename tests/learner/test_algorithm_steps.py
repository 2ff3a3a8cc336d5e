"""One learner step of the tiny model for every choice of the loss, with one trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from tests.learner.rank_worker import small_config
from tests.learner.training_data import TrainingData
from vz_ray.config.learner import OptimizerConfig
from vz_ray.config.loss import LossConfig
from vz_ray.env.trajectory import EpisodeStatus, Group, SampledAction, Trajectory
from vz_ray.learner.mini_batch import build_mini_batches
from vz_ray.learner.trainer import Trainer
from vz_ray.video.frame import ZoomRequest

REJECTED_TOKENS = 5
"""First tokens of the first trajectory that the engine finds more probable than the learner."""

CHOICES = {
    "default": LossConfig(),
    "dual_clip": LossConfig(clip_ratio_c=3.0),
    "cispo": LossConfig(policy_loss="cispo", clip_ratio_low=1.0, clip_ratio_high=2.0),
    "sequence_cispo": LossConfig(policy_loss="cispo", importance_sampling_level="sequence"),
    "token_tis": LossConfig(tis_cap=2.0),
    "sequence_tis": LossConfig(tis_cap=2.0, tis_level="sequence"),
    "icepop": LossConfig(rejection="token", tis_cap=5.0),
    "sequence_rejection": LossConfig(rejection="sequence"),
    "geometric_rejection": LossConfig(rejection="geometric", rejection_low=0.98, rejection_high=1.02),
    **{kind: LossConfig(kl_coef=0.1, kl_estimator=kind) for kind in ("k1", "k2", "abs")},
    "capped_k3": LossConfig(kl_coef=0.1, kl_cap=10.0),
    "kl_in_advantage": LossConfig(kl_coef=0.1, kl_placement="advantage", kl_estimator="k1"),
    "shaped_turns": LossConfig(turn_credit="shaped"),
    "turn_returns": LossConfig(turn_credit="returns", policy_loss="cispo"),
    "masked_turns": LossConfig(mask_truncated="turn"),
    "masked_episodes": LossConfig(mask_truncated="episode", aggregation="token_mean"),
}


@dataclass
class Setup:
    """The trainer that all choices share, and groups with log-probs close to its own."""

    trainer: Trainer
    data: TrainingData
    groups: list[Group]

    def step(self, loss: LossConfig) -> dict[str, float]:
        self.trainer.config.loss = loss
        return self.trainer.grpo_step(self.groups, self.data.pixels)


@pytest.fixture(scope="module")
def setup(data: TrainingData) -> Setup:
    """Zooms have turn rewards; of each group, one trajectory is truncated and one has a single turn."""
    # A small learning rate: the engine's log-probs stay close to the learner's.
    optimizer = OptimizerConfig(learning_rate=1e-6, weight_decay=0.0)
    trainer = Trainer(small_config(data.model, 0, mini_batch_size=8, optimizer=optimizer))
    logprobs = iter(trainer.compute_logprobs(data.trajectories, data.pixels))
    next_logprobs = next(logprobs).copy()
    next_logprobs[:REJECTED_TOKENS] += 1.0
    rows = iter([next_logprobs, *logprobs])
    rng = np.random.default_rng(0)
    groups = [
        replace(g, trajectories=tuple(with_engine(t, next(rows), rng) for t in g.trajectories)) for g in data.groups
    ]
    return Setup(trainer, data, groups)


def with_engine(trajectory: Trajectory, logprobs: np.ndarray, rng: np.random.Generator) -> Trajectory:
    turns, rewards = [], []
    for turn in trajectory.turns:
        assert isinstance(turn.action, SampledAction)
        count = len(turn.action.token_ids)
        own, logprobs = tuple(map(float, logprobs[:count])), logprobs[count:]
        zoom = ZoomRequest(0, 2, 1) if turn.observation else None
        turns.append(replace(turn, action=replace(turn.action, logprobs=own), zoom=zoom))
        rewards.append(float(rng.random()) if zoom else 0.0)
    assert trajectory.reward is not None
    status = EpisodeStatus.ANSWERED
    if trajectory.id.sample == 1:
        status, action = EpisodeStatus.TRUNCATED, turns[-1].action
        assert isinstance(action, SampledAction)
        turns[-1] = replace(turns[-1], action=replace(action, stop_reason="length"))
    reward = replace(trajectory.reward, turns=tuple(rewards))
    return replace(trajectory, turns=tuple(turns), status=status, reward=reward)


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_trains(setup: Setup, name: str) -> None:
    metrics = setup.step(CHOICES[name])
    assert metrics["updates"] == 1
    assert metrics["skipped"] == 0
    assert all(map(math.isfinite, metrics.values()))
    assert metrics["grad_norm"] > 1e-3


def test_rejection_is_reported(setup: Setup) -> None:
    """The first tokens of one of nine trajectories have the ratio e^-1."""
    tokens = sum(sum(t.loss_mask) for group in setup.groups for t in group.trajectories)
    metrics = setup.step(CHOICES["icepop"])
    assert metrics["rejected_token_rate"] == pytest.approx(REJECTED_TOKENS / tokens)
    assert (metrics["rejected_trajectory_rate"], metrics["truncated_weight_rate"]) == (0, 0)
    first = sum(setup.groups[0].trajectories[0].loss_mask)
    for name in ("sequence_rejection", "geometric_rejection"):
        metrics = setup.step(CHOICES[name])
        assert metrics["rejected_token_rate"] == pytest.approx(first / tokens)
        assert metrics["rejected_trajectory_rate"] == pytest.approx(1 / 9)
    assert not {"rejected_token_rate", "truncated_weight_rate", "clip_dual"} & setup.step(LossConfig()).keys()


def test_masks_and_turn_credit_reach_the_loss(setup: Setup) -> None:
    """At ratio 1 the policy loss is the sum of -A w over tokens."""
    trainer = setup.trainer
    for name in ("default", "shaped_turns", "masked_turns", "masked_episodes"):
        metrics = setup.step(CHOICES[name])
        plan, loss = trainer.micro_batches.plan, trainer.config.loss
        (batch,) = build_mini_batches(setup.groups, trainer.encode, plan, 8, loss)
        expected = 0.0
        for example, advantages, weights in zip(batch.examples, batch.advantages, batch.loss_weights, strict=True):
            turns = range(len(example.turn_lengths))
            advantage, weight = (
                values if len(values) > 1 else [values[0]] * len(turns) for values in (advantages, weights)
            )
            expected -= sum(example.turn_lengths[k] * advantage[k] * weight[k] for k in turns)
        assert metrics["policy_loss"] == pytest.approx(expected, abs=1e-5), name
    masked = [weights for weights in batch.loss_weights if not weights.any()]
    assert len(masked) == 3, "one truncated episode per group"


def test_entropy_coefficient_adapts_and_is_restored(setup: Setup, tmp_path: Path) -> None:
    """The entropy is below 100 nats, so that the coefficient grows by one step each time."""
    loss, trainer = LossConfig(entropy_target=100.0, entropy_step=0.5), setup.trainer
    first, second = (setup.step(loss)["entropy_coef"] for _ in range(2))
    assert second - first == pytest.approx(0.5)
    trainer.save_checkpoint(tmp_path / "checkpoint")
    expected = setup.step(loss)["entropy_coef"]
    trainer.load_checkpoint(tmp_path / "checkpoint")
    assert setup.step(loss)["entropy_coef"] == expected == pytest.approx(first + 1.0)
    metrics = setup.step(LossConfig(entropy_target=1e-9, entropy_step=0.5))
    assert metrics["entropy_coef"] == pytest.approx(first + 1.5), "the step before was below its target"
    assert setup.step(LossConfig(entropy_target=1e-9))["entropy_coef"] == 0
    assert "entropy_coef" not in setup.step(LossConfig())
