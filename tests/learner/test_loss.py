"""Loss terms against a loop over tokens and against hand-computed values."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from vz_ray.config.loss import LossConfig
from vz_ray.env.trajectory import EpisodeId, EpisodeStatus, Group, RewardParts, TokenContext, Trajectory
from vz_ray.learner.advantages import compute_advantages, is_informative
from vz_ray.learner.grpo_loss import LossInputs, grpo_loss, loss_weights
from vz_ray.learner.grpo_metrics import engine_mismatch, sequence_mismatch
from vz_ray.learner.kl import low_variance_kl
from vz_ray.learner.off_policy import truncated_importance_weights
from vz_ray.learner.policy_loss import clipped_policy_loss, importance_ratio

LENGTHS = [3, 5, 1]
LOSS_CONFIGS = [
    pytest.param(
        LossConfig(
            importance_sampling_level=level,
            aggregation=aggregation,
            fixed_length=7,
            tis_cap=cap,
            kl_coef=0.3,
            entropy_coef=0.2,
        ),
        id=f"{level}-{aggregation}-{cap}",
    )
    for level, aggregation, cap in itertools.product(
        ("token", "sequence"), ("sequence_mean", "token_mean", "fixed_length"), (None, 1.5)
    )
]


def group_with_rewards(*rewards: float, valid: bool = True) -> Group:
    trajectories = [
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
    return Group("t", tuple(trajectories))


def random_batch(seed: int = 0) -> tuple[torch.Tensor, LossInputs]:
    g = torch.Generator().manual_seed(seed)
    shape = (3, 5)
    mask = (torch.arange(5)[None] < torch.tensor(LENGTHS)[:, None]).float()
    new, old, engine, reference = (-3 * torch.rand(shape, generator=g) * mask for _ in range(4))
    weight = torch.tensor(loss_weights(LENGTHS, "sequence_mean", 1))[:, None]
    return new, LossInputs(torch.tensor([[1.0], [-2.0], [0.5]]), weight, mask, old, engine, reference)


def test_advantages_are_centered_and_scaled() -> None:
    assert compute_advantages([1.0, 0.0]).tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)], abs=1e-5)
    assert compute_advantages([3.0, 1.0, 2.0], "dr_grpo").tolist() == [1.0, -1.0, 0.0]


def test_uninformative_groups_are_detected() -> None:
    assert is_informative(group_with_rewards(0.0, 1.0))
    assert not is_informative(group_with_rewards(0.5, 0.5, 0.5))
    assert not is_informative(group_with_rewards(0.0, 1.0, valid=False))
    assert not is_informative(group_with_rewards(1.0))
    unscored = Trajectory(EpisodeId(0, "t", 0), "", TokenContext((1,)), (), EpisodeStatus.ANSWERED)
    assert not is_informative(Group("t", (unscored, *group_with_rewards(0.0, 1.0).trajectories)))


@pytest.mark.parametrize("config", LOSS_CONFIGS)
def test_grpo_loss_matches_a_loop_over_tokens(config: LossConfig) -> None:
    new, inputs = random_batch()
    weights = loss_weights(LENGTHS, config.aggregation, 7)
    inputs = replace(inputs, weights=torch.tensor(weights)[:, None])
    entropy = torch.rand(3, 5, generator=torch.Generator().manual_seed(9)) * inputs.mask
    loss, sums = grpo_loss(new, entropy, inputs, config)
    assert loss.item() == pytest.approx(loss_by_loop(new, entropy, inputs, config), rel=1e-5)
    assert sums["sampled"] == sum(LENGTHS)


def loss_by_loop(new: torch.Tensor, entropy: torch.Tensor, inputs: LossInputs, config: LossConfig) -> float:
    trajectories = []
    for b, length in enumerate(LENGTHS):
        advantage = float(inputs.advantages[b, 0])
        logs = [float(new[b, t] - inputs.old_logprobs[b, t]) for t in range(length)]
        tokens = []
        for t in range(length):
            r = math.exp(logs[t] if config.importance_sampling_level == "token" else sum(logs) / length)
            clipped = min(max(r, 1 - config.clip_ratio_low), 1 + config.clip_ratio_high)
            value = -min(r * advantage, clipped * advantage)
            if config.tis_cap is not None:
                value *= min(math.exp(float(inputs.old_logprobs[b, t] - inputs.engine_logprobs[b, t])), config.tis_cap)
            d = float(inputs.ref_logprobs[b, t] - new[b, t])
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
    loss = clipped_policy_loss(ratio, torch.tensor([[1.0], [-1.0]]), 0.2, 0.27)
    torch.testing.assert_close(loss.detach(), torch.tensor([[-0.7, -1.1, -1.27], [0.8, 1.1, 1.4]]))
    loss.sum().backward()
    assert ratio.grad is not None
    assert ratio.grad.tolist() == [[-1, -1, 0], [0, 1, 1]]


def float64_tensor(rows: list[list[float]], *, grad: bool = False) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64, requires_grad=grad)


def test_kl_estimate_and_gradient_by_hand() -> None:
    """k3 = e^d - d - 1 with d = reference - new; its derivative by new is 1 - e^d."""
    new = float64_tensor([[-1.0, -1.0, -1.0]], grad=True)
    kl = low_variance_kl(new, float64_tensor([[-1.0, math.log(2) - 1, -math.log(2) - 1]]))
    assert kl.tolist()[0] == pytest.approx([0.0, 1 - math.log(2), math.log(2) - 0.5])
    kl.sum().backward()
    assert new.grad is not None
    assert new.grad.tolist()[0] == pytest.approx([0.0, -1.0, 0.5])


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        # Advantages 1 and -1 at ratio 1: the loss of a token is -1 in the first trajectory, 1 in the second.
        ("sequence_mean", {"loss": 0.0, "slopes": [-1 / 2, 1 / 6]}),
        ("token_mean", {"loss": (3 - 1) / 4, "slopes": [-1 / 4, 1 / 4]}),  # DAPO
        ("fixed_length", {"loss": (3 - 1) / (2 * 5), "slopes": [-1 / 10, 1 / 10]}),  # Dr.GRPO
    ],
)
def test_aggregations_by_hand(aggregation: str, expected: dict[str, Any]) -> None:
    """Trajectories of 1 and 3 tokens; slopes are derivatives by the first log-prob of each."""
    config = LossConfig(aggregation=aggregation, fixed_length=5, kl_coef=0.0, entropy_coef=0.0)
    new = float64_tensor([[-1.0, 0.0, 0.0], [-1.0, -2.0, -3.0]], grad=True)
    weight = torch.tensor(loss_weights([1, 3], aggregation, 5), dtype=torch.float64)[:, None]
    mask = float64_tensor([[1, 0, 0], [1, 1, 1]])
    advantage = float64_tensor([[1.0], [-1.0]])
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
    """GSPO: log-ratios 0.1 and 0.3 give the ratio e^0.2 for both tokens."""
    new = float64_tensor([[-1.0, -2.0]], grad=True)
    config = LossConfig(importance_sampling_level="sequence", clip_ratio_high=0.3, kl_coef=0.0, entropy_coef=0.0)
    inputs = LossInputs(
        float64_tensor([[2.0]]),
        float64_tensor([[0.5]]),
        float64_tensor([[1, 1]]),
        float64_tensor([[-1.1, -2.3]]),
        new,
        None,
    )
    loss, _ = grpo_loss(new, torch.zeros_like(new), inputs, config)
    assert loss.item() == pytest.approx(-2 * math.exp(0.2))
    loss.backward()
    assert new.grad is not None
    assert new.grad.tolist()[0] == pytest.approx([-math.exp(0.2)] * 2)
    tight = replace(config, clip_ratio_high=0.2)  # e^0.2 is above 1.2
    loss, _ = grpo_loss(new, torch.zeros_like(new), inputs, tight)
    assert loss.item() == pytest.approx(-2 * 1.2)
    assert torch.autograd.grad(loss, new)[0].tolist() == [[0, 0]]


def test_importance_weights_scale_loss_and_gradient() -> None:
    """Importance weights e^0.4 and e; the cap of 1.5 applies to the second."""
    new, engine = float64_tensor([[-1.0, -2.0]], grad=True), float64_tensor([[-1.4, -3.0]], grad=True)
    config = LossConfig(tis_cap=1.5, kl_coef=0.0, entropy_coef=0.0)
    unit = float64_tensor([[1.0]])
    loss, _ = grpo_loss(
        new,
        torch.zeros_like(new),
        LossInputs(unit, unit, float64_tensor([[1, 1]]), new.detach(), engine.detach(), None),
        config,
    )
    assert loss.item() == pytest.approx(-math.exp(0.4) - 1.5)
    loss.backward()
    assert new.grad is not None
    assert new.grad.tolist()[0] == pytest.approx([-math.exp(0.4), -1.5])


def test_entropy_is_rewarded_by_hand() -> None:
    new, entropy = float64_tensor([[-1.0, -1.0]]), float64_tensor([[0.5, 2.0]], grad=True)
    config = LossConfig(entropy_coef=0.1, kl_coef=0.0)
    inputs = LossInputs(float64_tensor([[0.0]]), float64_tensor([[0.5]]), float64_tensor([[1, 1]]), new, new, None)
    loss, _ = grpo_loss(new, entropy, inputs, config)
    assert loss.item() == pytest.approx(-0.1 * (0.5 + 2.0) / 2)
    loss.backward()
    assert entropy.grad is not None
    assert entropy.grad.tolist() == [[-0.05, -0.05]]


@pytest.mark.parametrize("config", LOSS_CONFIGS)
def test_gradient_matches_finite_differences(config: LossConfig) -> None:
    """Compare autograd with finite differences in float64, including KL and entropy."""
    new, inputs = random_batch(3)
    doubled = [t.double() for t in (inputs.advantages, inputs.mask, inputs.old_logprobs, inputs.engine_logprobs)]
    advantage, mask, old, engine = doubled
    weight = torch.tensor(loss_weights(LENGTHS, config.aggregation, 7), dtype=torch.float64)[:, None]
    assert inputs.ref_logprobs is not None
    fixed = LossInputs(advantage, weight, mask, old, engine, inputs.ref_logprobs.double())
    entropy = torch.rand(3, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * mask
    ratios = importance_ratio(new.double(), old, mask, config.importance_sampling_level)[mask.bool()]
    kinks = torch.tensor([1 - config.clip_ratio_low, 1 + config.clip_ratio_high], dtype=torch.float64)
    assert (ratios[:, None] - kinks).abs().min() > 1e-4, "finite differences are invalid across a kink"
    inside = (ratios > kinks[0]) & (ratios < kinks[1])
    assert inside.any() or config.importance_sampling_level == "sequence"
    assert torch.autograd.gradcheck(
        lambda n, e: grpo_loss(n, e, fixed, config)[0],
        (new.double().requires_grad_(), entropy.requires_grad_()),
    )


def test_sequence_ratio_is_the_mean_over_sampled_tokens() -> None:
    new, inputs = random_batch()
    ratio = importance_ratio(new, inputs.old_logprobs, inputs.mask, "sequence")
    expected = math.exp(float((new - inputs.old_logprobs)[0, :3].mean()))
    assert ratio[0].tolist() == pytest.approx([expected] * 5)


def test_kl_estimate_is_never_negative() -> None:
    new, inputs = random_batch()
    assert inputs.ref_logprobs is not None
    assert low_variance_kl(new, new).abs().max() == 0
    assert low_variance_kl(new, inputs.ref_logprobs).min() >= 0


def test_importance_weights_are_truncated_and_default_to_1() -> None:
    old = torch.tensor([[0.0, -1.0, -1.0]])
    engine = torch.tensor([[-3.0, -0.5, float("nan")]])
    weights = truncated_importance_weights(old, engine, 2.0, torch.ones_like(old))
    assert weights.tolist()[0] == pytest.approx([2.0, math.exp(-0.5), 1.0])


def test_extreme_logprobs_stay_finite() -> None:
    new, old, mask = torch.zeros(1, 2), torch.full((1, 2), -1e4), torch.ones(1, 2)
    assert importance_ratio(new, old, mask).isfinite().all()
    assert low_variance_kl(new, old).isfinite().all()
    assert low_variance_kl(old, new).isfinite().all()


def test_mismatch_ignores_external_tokens() -> None:
    old, mask = torch.tensor([[-1.0, -2.0, -3.0, -1.0]]), torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    engine = torch.tensor([[-1.5, float("nan"), -9.0, -3.0]])
    stale = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    sums, maxima = engine_mismatch(old, engine, {"": mask - stale, "_stale": stale})
    assert maxima == {"mismatch_abs_max": 0.5, "mismatch_abs_max_stale": 2.0}
    assert (sums["compared"], sums["compared_stale"]) == (1, 1)
    assert sums["mismatch_kl"] == pytest.approx(math.exp(0.5) - 0.5 - 1)
    assert sums["mismatch_kl_stale"] == pytest.approx(math.exp(2.0) - 2.0 - 1)


def test_sequence_mismatch_sums_over_a_trajectory() -> None:
    """Rows: errors of one sign, errors that cancel, an external turn and padding, nothing to compare."""
    nan = float("nan")
    engine = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0], [-1.0, nan, -9.0], [nan, nan, -1.0]])
    old = engine.nan_to_num(nan=-5.0) + torch.tensor(
        [[-0.3, -0.3, -0.3], [0.5, -0.4, 0.0], [0.2, 1.0, 5.0], [1.0, 1.0, 1.0]]
    )
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    sums, maximum = sequence_mismatch(old, engine, mask)
    assert maximum == pytest.approx(0.9)
    assert sums["compared_sequences"] == 3
    assert sums["mismatch_sequence_abs_mean"] == pytest.approx(0.9 + 0.1 + 0.2)
    assert sums["mismatch_sequence_outlier_rate"] == 1
    assert sequence_mismatch(old[3:], engine[3:], mask[3:])[1] == 0


def test_unknown_aggregation_is_refused() -> None:
    with pytest.raises(ValueError, match="'median'"):
        loss_weights([1], "median", 1)


def test_config_refuses_invalid_values() -> None:
    with pytest.raises(ValueError, match=r"importance_sampling_level is 'tokens'"):
        LossConfig(importance_sampling_level="tokens")
    with pytest.raises(ValueError, match=r"clip_ratio_low is -0\.1"):
        LossConfig(clip_ratio_low=-0.1)
