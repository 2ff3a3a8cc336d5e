"""Choices of `learner.loss`: values and gradients by hand, gradient checks, and the default against its formula."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.learner.test_loss import LENGTHS, float64_tensor, random_batch
from vz_ray.config.learner import LearnerConfig
from vz_ray.config.loss import LossConfig
from vz_ray.learner.entropy import EntropyController
from vz_ray.learner.grpo_loss import LossInputs, grpo_loss, loss_weights
from vz_ray.learner.kl import KL_ESTIMATORS, estimate_kl
from vz_ray.learner.off_policy import rejection_mask, truncated_importance_weights
from vz_ray.learner.policy_loss import cispo_loss, clipped_policy_loss

NAN = float("nan")
PLAIN = LossConfig(kl_coef=0.0, entropy_coef=0.0)
CHOICES = {
    "dual_clip": LossConfig(clip_ratio_c=2.0),
    "k1": LossConfig(kl_coef=0.3, kl_estimator="k1"),
    "k2": LossConfig(kl_coef=0.3, kl_estimator="k2"),
    "abs": LossConfig(kl_coef=0.3, kl_estimator="abs"),
    "capped_k3": LossConfig(kl_coef=0.3, kl_cap=0.4),
    "kl_in_advantage": LossConfig(kl_coef=0.3, kl_placement="advantage", kl_estimator="k1"),
    "sequence_tis": LossConfig(tis_cap=2.0, tis_level="sequence"),
    "token_rejection": LossConfig(rejection="token", tis_cap=5.0),
    "sequence_rejection": LossConfig(rejection="sequence"),
    "geometric_rejection": LossConfig(rejection="geometric", rejection_low=0.5, rejection_high=1.5),
}


def double_batch(seed: int = 3) -> tuple[Tensor, LossInputs, Tensor]:
    """Return log-probs, inputs with advantages per token, and entropies, in float64."""
    new, inputs = random_batch(seed)
    assert inputs.ref_logprobs is not None
    generator = torch.Generator().manual_seed(seed)
    advantages = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    entropy = torch.rand(3, 5, generator=generator, dtype=torch.float64) * inputs.mask
    doubled = LossInputs(
        advantages,
        torch.tensor(loss_weights(LENGTHS, "token_mean", 1), dtype=torch.float64)[:, None],
        inputs.mask.double(),
        inputs.old_logprobs.double(),
        inputs.engine_logprobs.double(),
        inputs.ref_logprobs.double(),
    )
    return new.double(), doubled, entropy


def one_row(old: list[float], **changes: Any) -> LossInputs:
    """Return inputs of one trajectory with advantage 1 and weight 1."""
    old_logprobs = float64_tensor([old])
    ones = float64_tensor([[1.0]])
    inputs = LossInputs(ones, ones, torch.ones_like(old_logprobs), old_logprobs, old_logprobs, None)
    return replace(inputs, **changes)


@pytest.mark.parametrize("config", CHOICES.values(), ids=CHOICES)
def test_gradient_of_every_choice_matches_finite_differences(config: LossConfig) -> None:
    new, inputs, entropy = double_batch()
    assert torch.autograd.gradcheck(
        lambda n, e: grpo_loss(n, e, inputs, config)[0], (new.requires_grad_(), entropy.requires_grad_())
    )


def test_defaults_equal_the_formula_bit_for_bit() -> None:
    """GRPO as in the paper: clipped ratio, k3 without cap, entropy; any new choice must leave these bits alone."""
    new, inputs = random_batch(5)
    entropy = torch.rand(3, 5, generator=torch.Generator().manual_seed(9)) * inputs.mask
    config = LossConfig(tis_cap=1.5)
    assert inputs.ref_logprobs is not None

    def formula(new: Tensor) -> Tensor:
        weight, a = inputs.mask * inputs.weights, inputs.advantages
        ratio = ((new - inputs.old_logprobs) * inputs.mask).clamp(-20, 20).exp()
        policy = -torch.minimum(ratio * a, ratio.clamp(1 - 0.2, 1 + 0.27) * a)
        policy = policy * (inputs.old_logprobs - inputs.engine_logprobs).clamp(max=20).exp().clamp(max=1.5)
        d = (inputs.ref_logprobs - new).clamp(-20, 20)
        loss = (policy * weight).sum() - 0.001 * (entropy * weight).sum()
        return loss + 0.001 * ((d.exp() - d - 1) * weight).sum()

    results = []
    for function in (lambda n: grpo_loss(n, entropy, inputs, config)[0], formula):
        point = new.clone().requires_grad_()
        loss = function(point)
        results.append((loss.detach(), torch.autograd.grad(loss, point)[0]))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


def test_dual_clip_limits_the_loss_of_negative_advantages() -> None:
    """Ratios 2 and 5, c = 3: the loss -r A is capped at 3 for A = -1; A = 1 is clipped as before."""
    ratio = float64_tensor([[2.0, 5.0], [2.0, 5.0]], grad=True)
    loss = clipped_policy_loss(ratio, float64_tensor([[-1.0], [1.0]]), 0.2, 0.27, dual_clip=3.0)
    assert loss.tolist() == [[2.0, 3.0], [-1.27, -1.27]]
    assert torch.autograd.grad(loss.sum(), ratio)[0].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    new = float64_tensor([[math.log(2.0), math.log(5.0)]])
    inputs = one_row([0.0, 0.0], advantages=float64_tensor([[-1.0]]))
    _, sums = grpo_loss(new, new * 0, inputs, replace(PLAIN, clip_ratio_c=3.0))
    assert sums["clip_dual"] == 1


def test_cispo_keeps_the_gradient_of_clipped_tokens() -> None:
    """The gradient by a log-prob is -clip(r, 0.8, 1.27) A, also where the surrogate of PPO has none."""
    new = float64_tensor([[math.log(0.5), math.log(1.1), math.log(2.0)]] * 2, grad=True)
    advantage = float64_tensor([[1.0], [-2.0]])
    loss = cispo_loss(new, new.exp(), advantage, 0.2, 0.27)
    assert loss[0].tolist() == pytest.approx([-0.8 * math.log(0.5), -1.1 * math.log(1.1), -1.27 * math.log(2.0)])
    gradient = torch.autograd.grad(loss.sum(), new)[0]
    assert gradient.tolist() == [pytest.approx([-0.8, -1.1, -1.27]), pytest.approx([1.6, 2.2, 2.54])]
    unbounded = torch.autograd.grad(cispo_loss(new, new.exp(), advantage, 1.0, 0.27)[0].sum(), new)[0]
    assert unbounded[0].tolist() == pytest.approx([-0.5, -1.1, -1.27])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_cispo_gradient_matches_finite_differences_at_constant_ratio(level: str) -> None:
    """CISPO is no objective; its gradient is that of log-probs with the ratio's value at this point."""
    config = replace(PLAIN, policy_loss="cispo", importance_sampling_level=level)
    new, inputs, entropy = double_batch()
    log_ratio = (new - inputs.old_logprobs) * inputs.mask
    if level == "sequence":
        log_ratio = (log_ratio.sum(-1, keepdim=True) / inputs.mask.sum(-1, keepdim=True)).expand_as(new)
    constant = log_ratio.exp().clamp(0.8, 1.27) * inputs.advantages * inputs.mask * inputs.weights
    point = new.clone().requires_grad_()
    loss, sums = grpo_loss(point, entropy, inputs, config)
    assert loss.item() == pytest.approx(float(-(constant * new).sum()))
    torch.testing.assert_close(torch.autograd.grad(loss, point)[0], -constant)
    clipped = inputs.mask.bool() & ((log_ratio.exp() > 1.27) | (log_ratio.exp() < 0.8))
    assert sums["clip_high"] + sums["clip_low"] == clipped.sum() > 0


def test_kl_estimators_by_hand() -> None:
    """d = log-prob - reference's is 0.5 and -2; derivatives by the log-prob: 1, d, 1 - exp(-d), sign(d)."""
    expected = {
        "k1": ([0.5, -2.0], [1.0, 1.0]),
        "k2": ([0.125, 2.0], [0.5, -2.0]),
        "k3": ([math.exp(-0.5) - 0.5, math.exp(2.0) - 3.0], [1 - math.exp(-0.5), 1 - math.exp(2.0)]),
        "abs": ([0.5, 2.0], [1.0, -1.0]),
    }
    assert expected.keys() == KL_ESTIMATORS.keys()
    for kind, (values, slopes) in expected.items():
        new = float64_tensor([[-1.0, -3.0]], grad=True)
        kl = estimate_kl(new, float64_tensor([[-1.5, -1.0]]), kind)
        assert kl[0].tolist() == pytest.approx(values), kind
        assert torch.autograd.grad(kl.sum(), new)[0][0].tolist() == pytest.approx(slopes), kind


def test_kl_cap_stops_value_and_gradient() -> None:
    """k3 at d = -3 is e^3 - 4 = 16.1: capped at 10 without gradient, as in the released code and in verl."""
    new = float64_tensor([[-4.0, -1.0]], grad=True)
    kl = estimate_kl(new, float64_tensor([[-1.0, -1.5]]), "k3", cap=10.0)
    assert kl[0].tolist() == pytest.approx([10.0, math.exp(-0.5) - 0.5])
    assert torch.autograd.grad(kl.sum(), new)[0][0].tolist() == pytest.approx([0.0, 1 - math.exp(-0.5)])
    assert estimate_kl(new, new + 3, "k1", cap=2.0).tolist() == [[-2.0, -2.0]]


def test_kl_in_the_advantage_is_subtracted_per_token() -> None:
    """Advantage 1, coefficient 0.5, k1 of the old log-probs 0.4 and -0.6: advantages 0.8 and 1.3."""
    config = replace(PLAIN, kl_coef=0.5, kl_placement="advantage", kl_estimator="k1")
    new = float64_tensor([[-1.0, -2.0]], grad=True)
    inputs = one_row([-1.0, -2.0], ref_logprobs=float64_tensor([[-1.4, -1.4]]))
    loss, sums = grpo_loss(new, new.detach() * 0, inputs, config)
    assert loss.item() == pytest.approx(-(0.8 + 1.3))
    assert torch.autograd.grad(loss, new)[0][0].tolist() == pytest.approx([-0.8, -1.3])
    assert sums["kl"] == pytest.approx(0.4 - 0.6)


def test_k1_in_the_advantage_has_the_gradient_of_k2_in_the_loss() -> None:
    """At ratio 1 (arXiv 2510.01555)."""
    new, inputs, entropy = double_batch()
    gradients = []
    for placement, kind in (("advantage", "k1"), ("loss", "k2")):
        point = new.clone().requires_grad_()
        config = LossConfig(kl_coef=0.3, kl_placement=placement, kl_estimator=kind)
        loss, _ = grpo_loss(point, entropy, replace(inputs, old_logprobs=new), config)
        gradients.append(torch.autograd.grad(loss, point)[0])
    torch.testing.assert_close(*gradients)


def test_corrections_by_hand() -> None:
    """Log-ratios 0.3 and -0.1, an external turn, padding; and a trajectory of external turns."""
    old = float64_tensor([[-1.0, -1.0, -1.0, 0.0], [-1.0, -1.0, 0.0, 0.0]])
    engine = float64_tensor([[-1.3, -0.9, NAN, 9.0], [NAN, NAN, 0.0, 0.0]])
    mask = float64_tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    weights = truncated_importance_weights(old, engine, 1.1, mask, "sequence")
    assert weights.flatten().tolist() == pytest.approx([1.1, 1.0])
    assert truncated_importance_weights(old, engine, 2.0, mask, "sequence")[0, 0] == pytest.approx(math.exp(0.2))

    def kept(level: str, low: float, high: float) -> list[list[bool]]:
        full = rejection_mask(old, engine, mask, level, (low, high)).expand_as(mask)
        return [row[:count].tolist() for row, count in zip(full, (3, 2), strict=True)]

    assert kept("token", 0.5, 1.3) == [[False, True, True], [True, True]]  # e^0.3 = 1.35
    assert kept("token", 0.95, 1.4) == [[True, False, True], [True, True]]  # e^-0.1 = 0.90
    assert kept("sequence", 0.5, 1.2) == [[False] * 3, [True, True]]  # e^0.2 = 1.22
    assert kept("sequence", 0.5, 1.3) == [[True] * 3, [True, True]]
    assert kept("geometric", 0.5, 1.10) == [[False] * 3, [True, True]]  # e^0.1 = 1.105
    assert kept("geometric", 0.5, 1.11) == [[True] * 3, [True, True]]


def test_rejected_tokens_have_no_loss_and_are_counted() -> None:
    """Ratios e^0.5 and 1: the first token leaves policy loss, KL and entropy; the second keeps its weight."""
    new = float64_tensor([[-1.0, -2.0]], grad=True)
    entropy = float64_tensor([[1.0, 1.0]], grad=True)
    inputs = one_row(
        [-1.0, -2.0], engine_logprobs=float64_tensor([[-1.5, -2.0]]), ref_logprobs=float64_tensor([[-3.0, -2.0]])
    )
    config = LossConfig(rejection="token", rejection_high=1.5, kl_coef=0.1, entropy_coef=0.1)
    loss, sums = grpo_loss(new, entropy, inputs, config)
    assert loss.item() == pytest.approx(-1.0 - 0.1)
    for point, slope in ((new, -1.0), (entropy, -0.1)):
        assert torch.autograd.grad(loss, point, retain_graph=True)[0][0].tolist() == pytest.approx([0.0, slope])
    assert (sums["rejected_token_rate"], sums["rejected_trajectory_rate"], sums["trajectories"]) == (1, 0, 1)
    _, sums = grpo_loss(new, entropy, inputs, replace(config, rejection="sequence"))
    assert (sums["rejected_token_rate"], sums["rejected_trajectory_rate"]) == (2, 1)


def test_truncated_weights_are_counted() -> None:
    new = float64_tensor([[-1.0, -2.0]])
    inputs = one_row([-1.0, -2.0], engine_logprobs=float64_tensor([[-1.5, -2.0]]))
    for cap, count in ((1.1, 1), (2.0, 0)):
        assert grpo_loss(new, new * 0, inputs, replace(PLAIN, tis_cap=cap))[1]["truncated_weight_rate"] == count


def test_masked_trajectories_do_not_count_in_the_weights() -> None:
    assert loss_weights([2, 0, 4], "sequence_mean", 1) == [1 / 4, 0, 1 / 8]
    assert loss_weights([2, 0, 4], "token_mean", 1) == [1 / 6, 0, 1 / 6]
    assert loss_weights([2, 0, 4], "fixed_length", 5) == [1 / 10, 0, 1 / 10]
    assert loss_weights([0, 0], "token_mean", 1) == [0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy_loss": "ppo"}, r"policy_loss is 'ppo'; it must be one of clip, cispo"),
        ({"kl_estimator": "k4"}, r"kl_estimator is 'k4'; it must be one of k3, k1, k2, abs"),
        ({"kl_cap": 0.0}, r"kl_cap is 0\.0; it must be finite and above 0"),
        ({"tis_cap": -1.0}, r"tis_cap is -1\.0; it must be finite and above 0"),
        ({"clip_ratio_c": 1.0}, r"clip_ratio_c is 1\.0; it must be above 1"),
        ({"rejection": "token", "rejection_low": 1.2}, r"rejection_low is 1\.2; it must be at least 0 and below 1"),
        ({"rejection": "token", "rejection_high": 0.9}, r"rejection_high is 0\.9; it must be above 1"),
        ({"rejection_high": 2.0}, r"rejection_high is 2\.0 and rejection is 'none'; .* token or sequence or geometric"),
        ({"clip_ratio_c": 3.0, "policy_loss": "cispo"}, r"clip_ratio_c is 3\.0 and policy_loss is 'cispo'; .* clip"),
        ({"tis_level": "sequence"}, r"tis_level is 'sequence' and tis_cap is null; it has no effect, set tis_cap"),
        ({"kl_coef": 0.0, "kl_placement": "advantage"}, r"kl_placement is 'advantage' and kl_coef is 0"),
        (
            {"turn_coef": 0.5},
            r"turn_coef is 0\.5 and turn_credit is 'none'; it has no effect, set turn_credit to shaped",
        ),
        ({"entropy_target": 0.0}, r"entropy_target is 0\.0; it must be finite and above 0"),
        ({"entropy_step": 0.01}, r"entropy_step is 0\.01 and entropy_target is null; .* set entropy_target"),
        ({"turn_discount": 0.5, "turn_credit": "shaped"}, r"turn_discount is 0\.5 and turn_credit is 'shaped'"),
    ],
)
def test_config_refuses_invalid_and_unused_values(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**change)


def test_entropy_coefficient_follows_the_target() -> None:
    config = LossConfig(entropy_target=0.2, entropy_coef=0.001, entropy_step=0.001)
    controller, applied = EntropyController(config.entropy_coef), []
    for entropy in (0.15, 0.1, 0.3, 0.25, 0.4, 0.5, 0.19):
        controller.update(entropy, config)
        applied.append(controller.apply(config).entropy_coef)
    assert applied == pytest.approx([0.002, 0.003, 0, 0, 0, 0, 0.001])
    fixed = LossConfig(entropy_coef=0.5)
    assert controller.apply(fixed) is fixed


def test_corrections_require_recomputed_logprobs() -> None:
    for loss, key in ((LossConfig(tis_cap=2.0), "tis_cap"), (LossConfig(rejection="token"), "rejection")):
        with pytest.raises(ValueError, match=rf"old_logprobs is 'engine', so that loss\.{key} has no effect"):
            LearnerConfig(old_logprobs="engine", loss=loss)


def test_rejection_has_a_band_of_its_own() -> None:
    assert LossConfig(rejection="token").rejection_band == (0.5, 5.0)
    assert LossConfig(rejection="geometric", rejection_high=1.01).rejection_band == (0.999, 1.01)
