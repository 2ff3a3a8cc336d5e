"""Each loss against the plainest possible loop, and against hand-computed cases."""

from __future__ import annotations

import math

import pytest
import torch

from vz_ray.config.learner import LossConfig
from vz_ray.episode.trajectory import Context, EpisodeId, Group, RewardParts, Status, Trajectory
from vz_ray.learner.advantage import advantages, is_informative
from vz_ray.learner.loss import (
    clipped_loss,
    importance_ratio,
    low_variance_kl,
    trajectory_weights,
    truncated_importance,
)
from vz_ray.learner.objective import Given, mismatch, objective

LENGTHS = [3, 5, 1]


def group(*rewards: float, valid: bool = True) -> Group:
    played = [
        Trajectory(
            EpisodeId(0, "t", i),
            "",
            Context((1,)),
            (),
            Status.ANSWERED,
            reward=RewardParts(r, r, 0, 0, valid),
        )
        for i, r in enumerate(rewards)
    ]
    return Group("t", tuple(played))


def random_batch(seed: int = 0) -> tuple[torch.Tensor, Given]:
    g = torch.Generator().manual_seed(seed)
    shape = (3, 5)
    mask = (torch.arange(5)[None] < torch.tensor(LENGTHS)[:, None]).float()
    new, old, engine, reference = (-3 * torch.rand(shape, generator=g) * mask for _ in range(4))
    weight = torch.tensor(trajectory_weights(LENGTHS, "sequence_mean", 1))
    return new, Given(torch.tensor([1.0, -2.0, 0.5]), weight, mask, old, engine, reference)


def test_advantages_are_centred_and_scaled_by_the_sample_deviation() -> None:
    assert advantages([1.0, 0.0]).tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)], abs=1e-5)
    assert advantages([3.0, 1.0, 2.0], "dr_grpo").tolist() == [1.0, -1.0, 0.0]


def test_groups_that_teach_nothing_are_told_apart() -> None:
    assert is_informative(group(0.0, 1.0))
    assert not is_informative(group(0.5, 0.5, 0.5))
    assert not is_informative(group(0.0, 1.0, valid=False))
    assert not is_informative(group(1.0))
    unscored = Trajectory(EpisodeId(0, "t", 0), "", Context((1,)), (), Status.ANSWERED)
    assert not is_informative(Group("t", (unscored, *group(0.0, 1.0).trajectories)))


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "fixed_length"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_objective_equals_a_loop_over_tokens(aggregation: str, ratio: str, cap: float | None) -> None:
    config = LossConfig(
        ratio=ratio, aggregation=aggregation, fixed_length=7, importance_cap=cap, kl=0.3, entropy=0.2
    )
    new, given = random_batch()
    weights = trajectory_weights(LENGTHS, aggregation, 7)
    given = Given(
        given.advantage, torch.tensor(weights), given.mask, given.old, given.engine, given.reference
    )
    entropy = torch.rand(3, 5, generator=torch.Generator().manual_seed(9)) * given.mask
    loss, sums = objective(new, entropy, given, config)
    assert loss.item() == pytest.approx(naive_objective(new, entropy, given, config), rel=1e-5)
    assert sums["sampled"] == sum(LENGTHS)


def naive_objective(new: torch.Tensor, entropy: torch.Tensor, given: Given, config: LossConfig) -> float:
    trajectories = []
    for b, length in enumerate(LENGTHS):
        advantage = float(given.advantage[b])
        logs = [float(new[b, t] - given.old[b, t]) for t in range(length)]
        tokens = []
        for t in range(length):
            r = math.exp(logs[t] if config.ratio == "token" else sum(logs) / length)
            clipped = min(max(r, 1 - config.clip_low), 1 + config.clip_high)
            value = -min(r * advantage, clipped * advantage)
            if config.importance_cap is not None:
                value *= min(math.exp(float(given.old[b, t] - given.engine[b, t])), config.importance_cap)
            d = float(given.reference[b, t] - new[b, t])
            value += config.kl * (math.exp(d) - d - 1) - config.entropy * float(entropy[b, t])
            tokens.append(value)
        trajectories.append(tokens)
    if config.aggregation == "token_mean":
        return sum(map(sum, trajectories)) / sum(LENGTHS)
    if config.aggregation == "fixed_length":
        return sum(map(sum, trajectories)) / (len(LENGTHS) * config.fixed_length)
    return sum(sum(tokens) / len(tokens) for tokens in trajectories) / len(LENGTHS)


def test_clipping_is_asymmetric_and_stops_the_gradient() -> None:
    ratio = torch.tensor([[0.7, 1.1, 1.4], [0.7, 1.1, 1.4]], requires_grad=True)
    loss = clipped_loss(ratio, torch.tensor([1.0, -1.0]), 0.2, 0.27)
    torch.testing.assert_close(loss.detach(), torch.tensor([[-0.7, -1.1, -1.27], [0.8, 1.1, 1.4]]))
    loss.sum().backward()
    assert ratio.grad is not None
    assert ratio.grad.tolist() == [[-1, -1, 0], [0, 1, 1]]


def test_sequence_ratio_is_the_geometric_mean_over_sampled_tokens_only() -> None:
    new, given = random_batch()
    ratio = importance_ratio(new, given.old, given.mask, "sequence")
    expected = math.exp(float((new - given.old)[0, :3].mean()))
    assert ratio[0].tolist() == pytest.approx([expected] * 5)


def test_kl_estimate_is_zero_at_equality_and_never_negative() -> None:
    new, given = random_batch()
    assert given.reference is not None
    assert low_variance_kl(new, new).abs().max() == 0
    assert low_variance_kl(new, given.reference).min() >= 0


def test_importance_weights_are_truncated_and_one_where_nothing_was_sampled() -> None:
    old = torch.tensor([[0.0, -1.0, -1.0]])
    engine = torch.tensor([[-3.0, -0.5, float("nan")]])
    assert truncated_importance(old, engine, 2.0).tolist()[0] == pytest.approx([2.0, math.exp(-0.5), 1.0])


def test_far_away_log_probs_stay_finite() -> None:
    new, old, mask = torch.zeros(1, 2), torch.full((1, 2), -1e4), torch.ones(1, 2)
    assert importance_ratio(new, old, mask).isfinite().all()
    assert low_variance_kl(new, old).isfinite().all()
    assert low_variance_kl(old, new).isfinite().all()


def test_mismatch_counts_only_tokens_that_an_engine_sampled_and_each_part_apart() -> None:
    old, mask = torch.tensor([[-1.0, -2.0, -3.0, -1.0]]), torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    engine = torch.tensor([[-1.5, float("nan"), -9.0, -3.0]])
    late = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    sums, worst = mismatch(old, engine, {"": mask - late, "_stale": late})
    assert worst == {"mismatch_abs_max": 0.5, "mismatch_abs_max_stale": 2.0}
    assert (sums["compared"], sums["compared_stale"]) == (1, 1)
    assert sums["mismatch_kl"] == pytest.approx(math.exp(0.5) - 0.5 - 1)
    assert sums["mismatch_kl_stale"] == pytest.approx(math.exp(2.0) - 2.0 - 1)


def test_an_unknown_aggregation_is_named() -> None:
    with pytest.raises(ValueError, match="'median'"):
        trajectory_weights([1], "median", 1)


def test_config_names_the_value_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"loss\.ratio is 'tokens'"):
        LossConfig(ratio="tokens")
    with pytest.raises(ValueError, match=r"loss\.clip_low is -0\.1"):
        LossConfig(clip_low=-0.1)
