"""Each loss against the plainest possible loop, and against hand-computed cases."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from vz_ray.config.learner import LossConfig
from vz_ray.env.trajectory import EpisodeId, EpisodeStatus, Group, RewardParts, TokenContext, Trajectory
from vz_ray.learner.advantage import compute_advantages, is_informative
from vz_ray.learner.grpo_loss import LossInputs, engine_mismatch, grpo_loss
from vz_ray.learner.loss import (
    clipped_policy_loss,
    importance_ratio,
    loss_weights,
    low_variance_kl,
    truncated_importance_weights,
)

LENGTHS = [3, 5, 1]


def group(*rewards: float, valid: bool = True) -> Group:
    played = [
        Trajectory(
            EpisodeId(0, "t", i),
            "",
            TokenContext((1,)),
            (),
            EpisodeStatus.ANSWERED,
            reward=RewardParts(r, r, 0, 0, valid),
        )
        for i, r in enumerate(rewards)
    ]
    return Group("t", tuple(played))


def random_batch(seed: int = 0) -> tuple[torch.Tensor, LossInputs]:
    g = torch.Generator().manual_seed(seed)
    shape = (3, 5)
    mask = (torch.arange(5)[None] < torch.tensor(LENGTHS)[:, None]).float()
    new, old, engine, reference = (-3 * torch.rand(shape, generator=g) * mask for _ in range(4))
    weight = torch.tensor(loss_weights(LENGTHS, "sequence_mean", 1))
    return new, LossInputs(torch.tensor([1.0, -2.0, 0.5]), weight, mask, old, engine, reference)


def test_advantages_are_centred_and_scaled_by_the_sample_deviation() -> None:
    assert compute_advantages([1.0, 0.0]).tolist() == pytest.approx(
        [math.sqrt(0.5), -math.sqrt(0.5)], abs=1e-5
    )
    assert compute_advantages([3.0, 1.0, 2.0], "dr_grpo").tolist() == [1.0, -1.0, 0.0]


def test_groups_that_teach_nothing_are_told_apart() -> None:
    assert is_informative(group(0.0, 1.0))
    assert not is_informative(group(0.5, 0.5, 0.5))
    assert not is_informative(group(0.0, 1.0, valid=False))
    assert not is_informative(group(1.0))
    unscored = Trajectory(EpisodeId(0, "t", 0), "", TokenContext((1,)), (), EpisodeStatus.ANSWERED)
    assert not is_informative(Group("t", (unscored, *group(0.0, 1.0).trajectories)))


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "fixed_length"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_objective_equals_a_loop_over_tokens(aggregation: str, ratio: str, cap: float | None) -> None:
    config = LossConfig(
        importance_sampling_level=ratio,
        aggregation=aggregation,
        fixed_length=7,
        tis_cap=cap,
        kl_coef=0.3,
        entropy_coef=0.2,
    )
    new, given = random_batch()
    weights = loss_weights(LENGTHS, aggregation, 7)
    given = LossInputs(
        given.advantages,
        torch.tensor(weights),
        given.mask,
        given.old_logprobs,
        given.engine_logprobs,
        given.ref_logprobs,
    )
    entropy = torch.rand(3, 5, generator=torch.Generator().manual_seed(9)) * given.mask
    loss, sums = grpo_loss(new, entropy, given, config)
    assert loss.item() == pytest.approx(naive_objective(new, entropy, given, config), rel=1e-5)
    assert sums["sampled"] == sum(LENGTHS)


def naive_objective(new: torch.Tensor, entropy: torch.Tensor, given: LossInputs, config: LossConfig) -> float:
    trajectories = []
    for b, length in enumerate(LENGTHS):
        advantage = float(given.advantages[b])
        logs = [float(new[b, t] - given.old_logprobs[b, t]) for t in range(length)]
        tokens = []
        for t in range(length):
            r = math.exp(logs[t] if config.importance_sampling_level == "token" else sum(logs) / length)
            clipped = min(max(r, 1 - config.clip_ratio_low), 1 + config.clip_ratio_high)
            value = -min(r * advantage, clipped * advantage)
            if config.tis_cap is not None:
                value *= min(
                    math.exp(float(given.old_logprobs[b, t] - given.engine_logprobs[b, t])), config.tis_cap
                )
            d = float(given.ref_logprobs[b, t] - new[b, t])
            value += config.kl_coef * (math.exp(d) - d - 1) - config.entropy_coef * float(entropy[b, t])
            tokens.append(value)
        trajectories.append(tokens)
    if config.aggregation == "token_mean":
        return sum(map(sum, trajectories)) / sum(LENGTHS)
    if config.aggregation == "fixed_length":
        return sum(map(sum, trajectories)) / (len(LENGTHS) * config.fixed_length)
    return sum(sum(tokens) / len(tokens) for tokens in trajectories) / len(LENGTHS)


def test_clipping_is_asymmetric_and_stops_the_gradient() -> None:
    ratio = torch.tensor([[0.7, 1.1, 1.4], [0.7, 1.1, 1.4]], requires_grad=True)
    loss = clipped_policy_loss(ratio, torch.tensor([1.0, -1.0]), 0.2, 0.27)
    torch.testing.assert_close(loss.detach(), torch.tensor([[-0.7, -1.1, -1.27], [0.8, 1.1, 1.4]]))
    loss.sum().backward()
    assert ratio.grad is not None
    assert ratio.grad.tolist() == [[-1, -1, 0], [0, 1, 1]]


def exact(rows: list[list[float]], *, grad: bool = False) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64, requires_grad=grad)


def test_kl_estimate_and_its_slope_by_hand() -> None:
    """k3 = e^d - d - 1 with d = reference - new; its derivative by new is 1 - e^d."""
    new = exact([[-1.0, -1.0, -1.0]], grad=True)
    kl = low_variance_kl(new, exact([[-1.0, math.log(2) - 1, -math.log(2) - 1]]))
    assert kl.tolist()[0] == pytest.approx([0.0, 1 - math.log(2), math.log(2) - 0.5])
    kl.sum().backward()
    assert new.grad is not None
    assert new.grad.tolist()[0] == pytest.approx([0.0, -1.0, 0.5])


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        # Advantages 1 and -1 at ratio 1: tokens are worth -1 in the first trajectory, 1 in the second.
        ("sequence_mean", {"loss": 0.0, "slopes": [-1 / 2, 1 / 6]}),
        ("token_mean", {"loss": (3 - 1) / 4, "slopes": [-1 / 4, 1 / 4]}),  # DAPO
        ("fixed_length", {"loss": (3 - 1) / (2 * 5), "slopes": [-1 / 10, 1 / 10]}),  # Dr.GRPO
    ],
)
def test_aggregations_by_hand(aggregation: str, expected: dict[str, Any]) -> None:
    """Trajectories of one and of three tokens; slopes are of the loss by each one's first log-prob."""
    config = LossConfig(aggregation=aggregation, fixed_length=5, kl_coef=0.0, entropy_coef=0.0)
    new = exact([[-1.0, 0.0, 0.0], [-1.0, -2.0, -3.0]], grad=True)
    weight = torch.tensor(loss_weights([1, 3], aggregation, 5), dtype=torch.float64)
    mask = exact([[1, 0, 0], [1, 1, 1]])
    advantage = torch.tensor([1.0, -1.0], dtype=torch.float64)
    loss, _ = grpo_loss(
        new,
        torch.zeros_like(new),
        LossInputs(advantage, weight, mask, new.detach(), new.detach(), None),
        config,
    )
    assert loss.item() == pytest.approx(expected["loss"])
    loss.backward()
    assert new.grad is not None
    assert new.grad[:, 0].tolist() == pytest.approx(expected["slopes"])
    assert new.grad[0, 1:].tolist() == [0, 0]


def test_sequence_ratio_by_hand() -> None:
    """GSPO: log-ratios 0.1 and 0.3 make e^0.2 for both tokens; each log-prob moves it by half of itself."""
    new = exact([[-1.0, -2.0]], grad=True)
    config = LossConfig(
        importance_sampling_level="sequence", clip_ratio_high=0.3, kl_coef=0.0, entropy_coef=0.0
    )
    given = LossInputs(
        exact([[2.0]])[0], exact([[0.5]])[0], exact([[1, 1]]), exact([[-1.1, -2.3]]), new, None
    )
    loss, _ = grpo_loss(new, torch.zeros_like(new), given, config)
    assert loss.item() == pytest.approx(-2 * math.exp(0.2))
    loss.backward()
    assert new.grad is not None
    assert new.grad.tolist()[0] == pytest.approx([-math.exp(0.2)] * 2)
    tight = replace(config, clip_ratio_high=0.2)  # e^0.2 is above 1.2
    loss, _ = grpo_loss(new, torch.zeros_like(new), given, tight)
    assert loss.item() == pytest.approx(-2 * 1.2)
    assert torch.autograd.grad(loss, new)[0].tolist() == [[0, 0]]


def test_importance_weights_scale_loss_and_slope_and_are_no_part_of_either() -> None:
    """Tokens that the engine found e^0.4 and e times less likely; the second counts 1.5 at most."""
    new, engine = exact([[-1.0, -2.0]], grad=True), exact([[-1.4, -3.0]], grad=True)
    config = LossConfig(tis_cap=1.5, kl_coef=0.0, entropy_coef=0.0)
    one = exact([[1.0]])[0]
    loss, _ = grpo_loss(
        new,
        torch.zeros_like(new),
        LossInputs(one, one, exact([[1, 1]]), new.detach(), engine.detach(), None),
        config,
    )
    assert loss.item() == pytest.approx(-math.exp(0.4) - 1.5)
    loss.backward()
    assert new.grad is not None
    assert new.grad.tolist()[0] == pytest.approx([-math.exp(0.4), -1.5])


def test_entropy_is_rewarded_by_hand() -> None:
    new, entropy = exact([[-1.0, -1.0]]), exact([[0.5, 2.0]], grad=True)
    config = LossConfig(entropy_coef=0.1, kl_coef=0.0)
    given = LossInputs(exact([[0.0]])[0], exact([[0.5]])[0], exact([[1, 1]]), new, new, None)
    loss, _ = grpo_loss(new, entropy, given, config)
    assert loss.item() == pytest.approx(-0.1 * (0.5 + 2.0) / 2)
    loss.backward()
    assert entropy.grad is not None
    assert entropy.grad.tolist() == [[-0.05, -0.05]]


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "fixed_length"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_the_slope_is_that_of_the_value(aggregation: str, ratio: str, cap: float | None) -> None:
    """Autograd against finite differences in float64, for every kind of loss at once, KL and entropy too."""
    config = LossConfig(
        importance_sampling_level=ratio,
        aggregation=aggregation,
        fixed_length=7,
        tis_cap=cap,
        kl_coef=0.3,
        entropy_coef=0.2,
    )
    new, given = random_batch(3)
    doubled = [t.double() for t in (given.advantages, given.mask, given.old_logprobs, given.engine_logprobs)]
    advantage, mask, old, engine = doubled
    weight = torch.tensor(loss_weights(LENGTHS, aggregation, 7), dtype=torch.float64)
    assert given.ref_logprobs is not None
    fixed = LossInputs(advantage, weight, mask, old, engine, given.ref_logprobs.double())
    entropy = torch.rand(3, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * mask
    ratios = importance_ratio(new.double(), old, mask, ratio)[mask.bool()]
    kinks = torch.tensor([1 - config.clip_ratio_low, 1 + config.clip_ratio_high], dtype=torch.float64)
    assert (ratios[:, None] - kinks).abs().min() > 1e-4, "a difference across a kink would say nothing"
    inside = (ratios > kinks[0]) & (ratios < kinks[1])
    assert inside.any() or ratio == "sequence"
    assert torch.autograd.gradcheck(
        lambda n, e: grpo_loss(n, e, fixed, config)[0],
        (new.double().requires_grad_(), entropy.requires_grad_()),
    )


def test_sequence_ratio_is_the_geometric_mean_over_sampled_tokens_only() -> None:
    new, given = random_batch()
    ratio = importance_ratio(new, given.old_logprobs, given.mask, "sequence")
    expected = math.exp(float((new - given.old_logprobs)[0, :3].mean()))
    assert ratio[0].tolist() == pytest.approx([expected] * 5)


def test_kl_estimate_is_zero_at_equality_and_never_negative() -> None:
    new, given = random_batch()
    assert given.ref_logprobs is not None
    assert low_variance_kl(new, new).abs().max() == 0
    assert low_variance_kl(new, given.ref_logprobs).min() >= 0


def test_importance_weights_are_truncated_and_one_where_nothing_was_sampled() -> None:
    old = torch.tensor([[0.0, -1.0, -1.0]])
    engine = torch.tensor([[-3.0, -0.5, float("nan")]])
    assert truncated_importance_weights(old, engine, 2.0).tolist()[0] == pytest.approx(
        [2.0, math.exp(-0.5), 1.0]
    )


def test_far_away_log_probs_stay_finite() -> None:
    new, old, mask = torch.zeros(1, 2), torch.full((1, 2), -1e4), torch.ones(1, 2)
    assert importance_ratio(new, old, mask).isfinite().all()
    assert low_variance_kl(new, old).isfinite().all()
    assert low_variance_kl(old, new).isfinite().all()


def test_mismatch_counts_only_tokens_that_an_engine_sampled_and_each_part_apart() -> None:
    old, mask = torch.tensor([[-1.0, -2.0, -3.0, -1.0]]), torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    engine = torch.tensor([[-1.5, float("nan"), -9.0, -3.0]])
    late = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    sums, worst = engine_mismatch(old, engine, {"": mask - late, "_stale": late})
    assert worst == {"mismatch_abs_max": 0.5, "mismatch_abs_max_stale": 2.0}
    assert (sums["compared"], sums["compared_stale"]) == (1, 1)
    assert sums["mismatch_kl"] == pytest.approx(math.exp(0.5) - 0.5 - 1)
    assert sums["mismatch_kl_stale"] == pytest.approx(math.exp(2.0) - 2.0 - 1)


def test_an_unknown_aggregation_is_named() -> None:
    with pytest.raises(ValueError, match="'median'"):
        loss_weights([1], "median", 1)


def test_config_names_the_value_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"importance_sampling_level is 'tokens'"):
        LossConfig(importance_sampling_level="tokens")
    with pytest.raises(ValueError, match=r"clip_ratio_low is -0\.1"):
        LossConfig(clip_ratio_low=-0.1)
