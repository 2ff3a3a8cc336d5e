"""On-policy distillation: advantages of a teacher, their gradient, and the groups that are kept."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.learner.rank_worker import small_config
from tests.learner.test_loss import group_with_rewards
from tests.learner.training_data import TrainingData
from vz_ray.config.learner import OptimizerConfig
from vz_ray.config.loss import LossConfig
from vz_ray.env.trajectory import EpisodeId, EpisodeStatus, ExternalAction, Group, TokenContext, Trajectory, Turn
from vz_ray.learner.advantages import compute_advantages, group_advantages, is_trainable
from vz_ray.learner.grpo_loss import LossInputs, grpo_loss
from vz_ray.learner.kl import distillation_advantages
from vz_ray.learner.trainer import Trainer

ALONE = LossConfig(kl_coef=0.0, entropy_coef=0.0, teacher_coef=1.0, reward_weight=0.0)
MIXED = replace(ALONE, teacher_coef=0.5, reward_weight=2.0)
TURN = Turn(ExternalAction("a", (1,)), "a", None, None)


def with_turns(group: Group) -> Group:
    return replace(group, trajectories=tuple(replace(t, turns=(TURN,)) for t in group.trajectories))


def test_advantages_by_hand() -> None:
    old, teacher = torch.tensor([[-1.0, -2.0, -0.5]]), torch.tensor([[-3.0, -1.0, -0.5]])
    assert distillation_advantages(old, teacher, 0.5).tolist() == [[-1.0, 0.5, 0.0]]
    assert distillation_advantages(old, teacher, 0.5, cap=1.5).tolist() == [[-0.75, 0.5, 0.0]]


def test_loss_adds_the_teacher_to_the_reward() -> None:
    """At ratio 1 the policy loss is the sum of -A w: here A is 2, minus half of the KL estimates 2, -1 and 0."""
    old, teacher = torch.tensor([[-1.0, -2.0, -0.5]]), torch.tensor([[-3.0, -1.0, -0.5]])
    weights = torch.tensor([[0.1, 0.2, 0.3]])
    inputs = LossInputs(torch.tensor([[2.0]]), weights, torch.ones(1, 3), old, old, None, teacher)
    loss, sums = grpo_loss(old.clone().requires_grad_(), torch.zeros(1, 3), inputs, MIXED)
    assert float(loss.detach()) == pytest.approx(-(0.1 * 1.0 + 0.2 * 2.5 + 0.3 * 2.0))
    assert sums["teacher_kl"] == pytest.approx(2.0 - 1.0)


@pytest.mark.parametrize("policy_loss", ["clip", "cispo"])
def test_expected_gradient_is_that_of_the_reverse_kl(policy_loss: str) -> None:
    """The expectation over a vocabulary of 6 tokens is exact: each token is a trajectory with its probability."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    new = logits.log_softmax(0)
    old = new.detach()
    inputs = LossInputs(
        advantages=torch.zeros(6, 1, dtype=torch.float64),
        weights=old.exp()[:, None],
        mask=torch.ones(6, 1, dtype=torch.float64),
        old_logprobs=old[:, None],
        engine_logprobs=old[:, None],
        ref_logprobs=None,
        teacher_logprobs=teacher[:, None],
    )
    config = replace(ALONE, teacher_coef=0.7, policy_loss=policy_loss)
    loss, _ = grpo_loss(new[:, None], torch.zeros(6, 1), inputs, config)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    reverse_kl = (new.exp() * (new - teacher)).sum()
    (expected,) = torch.autograd.grad(0.7 * reverse_kl, logits)
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-12)
    assert gradient.abs().max() > 0.01


def test_groups_that_a_teacher_trains_on() -> None:
    equal, different = (with_turns(group_with_rewards(*rewards)) for rewards in ((0.5, 0.5), (0.0, 1.0)))
    invalid = with_turns(group_with_rewards(0.0, 1.0, valid=False))
    single = with_turns(group_with_rewards(0.5))
    groups = (equal, different, invalid, single)
    assert [is_trainable(group, LossConfig()) for group in groups] == [False, True, False, False]
    assert [is_trainable(group, MIXED) for group in groups] == [True, True, False, True]
    assert [is_trainable(group, ALONE) for group in groups] == [True, True, True, True]
    failed = Trajectory(EpisodeId(0, "t", 0), "", TokenContext(()), (), EpisodeStatus.FAILED, error="no worker")
    assert not is_trainable(replace(equal, trajectories=(failed, *equal.trajectories)), ALONE)


def test_reward_advantages_beside_a_teacher() -> None:
    different = with_turns(group_with_rewards(0.0, 1.0))
    assert np.concatenate(group_advantages(different, MIXED)) == pytest.approx(2 * compute_advantages([0.0, 1.0]))
    for group, config in ((different, ALONE), (with_turns(group_with_rewards(0.5, 0.5)), MIXED)):
        assert np.concatenate(group_advantages(group, config)).tolist() == [0.0, 0.0]


def test_step_moves_log_probs_towards_the_teacher(data: TrainingData) -> None:
    """Without rewards. The teacher finds some of the sampled tokens more probable than the student, others less."""
    optimizer = OptimizerConfig(learning_rate=1e-4, weight_decay=0.0)
    trainer = Trainer(small_config(data.model, 0, mini_batch_size=8, optimizer=optimizer, loss=ALONE))
    before = trainer.compute_logprobs(data.trajectories, data.pixels)
    rng = np.random.default_rng(0)
    gaps = [rng.choice([-2.0, 2.0], len(row)) for row in before]
    rows = iter([tuple((row + gap).tolist()) for row, gap in zip(before, gaps, strict=True)])
    groups = [
        replace(group, trajectories=tuple(replace(t, teacher_logprobs=next(rows)) for t in group.trajectories))
        for group in data.groups
    ]
    metrics = trainer.grpo_step(groups, data.pixels)
    assert (metrics["groups"], metrics["updates"]) == (len(groups), 1)
    assert metrics["teacher_kl"] == pytest.approx(-np.concatenate(gaps).mean(), abs=1e-4)
    after = trainer.compute_logprobs(data.trajectories, data.pixels)
    moved, wanted = np.concatenate(after) - np.concatenate(before), np.concatenate(gaps)
    assert np.corrcoef(moved, wanted)[0, 1] > 0.2
    assert np.square(wanted - moved).mean() < np.square(wanted).mean()
    assert math.isfinite(metrics["grad_norm"])


def test_unscored_trajectory_is_named(data: TrainingData) -> None:
    trainer = Trainer(small_config(data.model, 0, mini_batch_size=8, loss=ALONE))
    with pytest.raises(ValueError, match=r"has 0 log-probs of the teacher for \d+ sampled tokens"):
        trainer.grpo_step(data.groups, data.pixels)
