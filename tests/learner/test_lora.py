"""Adapters: what is trained, what is published, and that both are one policy."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.learner.rank_worker import ADAPTERS, adapters, parameters, small_config, small_training_data
from tests.learner.test_trainer import assert_close_metrics, two_ranks
from tests.learner.training_data import TrainingData, small_model
from vz_ray.config.learner import LearnerConfig, LoraConfig, LossConfig, OptimizerConfig
from vz_ray.learner.policy_model import PolicyModel, load_pretrained
from vz_ray.learner.trainer import Trainer
from vz_ray.utils.errors import UserError

FAST = OptimizerConfig(learning_rate=2e-2, weight_decay=0.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return small_training_data(small_model(tmp_path_factory.mktemp("model")))


def adapted(world: TrainingData, stage: int = 0, lora: LoraConfig = ADAPTERS, **changes: Any) -> Trainer:
    settings = {"lora": lora, "optimizer": FAST, "loss": LossConfig(kl_coef=0.0)} | changes
    return Trainer(small_config(world.model, stage, **settings))


def gap(one: list[np.ndarray], two: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(one, two, strict=True))


def taught(trainer: Trainer, world: TrainingData, steps: int = 3) -> Trainer:
    for _ in range(steps):
        trainer.sft_step(world.trajectories[:4], world.pixels)
    return trainer


def test_training_starts_at_the_checkpoint_itself(world: TrainingData) -> None:
    plain = Trainer(small_config(world.model, 0, loss=LossConfig(kl_coef=0.0)))
    expected = plain.compute_logprobs(world.trajectories, world.pixels)
    assert gap(adapted(world).compute_logprobs(world.trajectories, world.pixels), expected) == 0.0


@pytest.mark.parametrize("lora", [ADAPTERS, replace(ADAPTERS, train_merger=True)], ids=["text", "merger"])
def test_only_adapters_change_and_the_merger_if_it_is_asked_for(
    world: TrainingData, lora: LoraConfig
) -> None:
    trainer = adapted(world, lora=lora)
    before = {name: p.detach().clone() for name, p in trainer.policy.hf.named_parameters()}
    losses = [trainer.sft_step(world.trajectories[:4], world.pixels)["loss"] for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1
    after = dict(trainer.policy.hf.named_parameters())
    changed = {name for name, p in before.items() if not torch.equal(p, after[name])}
    ours = {name for name in before if ".lora_" in name}
    assert len(ours) == 2 * 7 * trainer.policy.hf.config.get_text_config().num_hidden_layers
    assert changed == ours | ({name for name in before if ".merger." in name} if lora.train_merger else set())


def test_what_is_published_is_the_sum_under_plain_names_and_leaves_training_alone(
    world: TrainingData,
) -> None:
    trainer = taught(adapted(world), world)
    before = {name: p.detach().clone() for name, p in trainer.policy.hf.named_parameters()}
    merged, source = parameters(trainer), trainer.weight_source()
    base = dict(PolicyModel.from_pretrained(world.model).hf.named_parameters())
    assert [spec.name for spec in source.specs()] == list(base) == list(merged)
    assert [spec.shape for spec in source.specs()] == [tuple(p.shape) for p in base.values()]
    for name, weight in base.items():
        layer = name.removesuffix(".weight")
        expected = weight.detach()
        if f"{layer}.lora_A.default.weight" in before:
            a, b = (before[f"{layer}.lora_{part}.default.weight"] for part in "AB")
            expected = expected + 2.0 * b @ a  # alpha 8 / rank 4
            assert not torch.equal(expected, weight)
        np.testing.assert_allclose(merged[name], expected.numpy(), atol=1e-7, rtol=0, err_msg=name)
    for name, parameter in trainer.policy.hf.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("lora", [ADAPTERS, replace(ADAPTERS, train_merger=True)], ids=["text", "merger"])
def test_an_export_is_the_same_policy_merged_and_as_pefts_adapter(
    world: TrainingData, tmp_path: Path, lora: LoraConfig
) -> None:
    from peft import PeftModel

    trainer = taught(adapted(world, lora=lora), world)
    trainer.export_hf(tmp_path / "export")
    expected = trainer.compute_logprobs(world.trajectories, world.pixels)
    merged = Trainer(small_config(tmp_path / "export", 0, loss=LossConfig(kl_coef=0.0)))
    assert gap(merged.compute_logprobs(world.trajectories, world.pixels), expected) <= 1e-5
    untrained = Trainer(small_config(world.model, 0, loss=LossConfig(kl_coef=0.0)))
    assert gap(untrained.compute_logprobs(world.trajectories, world.pixels), expected) > 1e-2

    base = load_pretrained(world.model, torch.float32)
    read = PeftModel.from_pretrained(base, str(tmp_path / "export" / "adapter")).merge_and_unload()
    theirs = dict(read.named_parameters())
    for name, tensor in parameters(trainer).items():
        np.testing.assert_allclose(theirs[name].detach().numpy(), tensor, atol=1e-6, rtol=0, err_msg=name)
    settings = json.loads((tmp_path / "export" / "adapter" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["r"]) == (str(world.model), 4)


def test_the_reference_is_the_model_without_its_adapters(world: TrainingData, tmp_path: Path) -> None:
    """Against a reference model that is loaded apart, from a copy of the checkpoint."""
    shutil.copytree(world.model, tmp_path / "copy")
    loss = LossConfig(kl_coef=0.1)
    own = adapted(world, loss=loss)
    apart = adapted(world, loss=loss, reference_model=str(tmp_path / "copy"))
    assert own.reference_logprobs == own._base_logprobs
    assert isinstance(apart.reference_logprobs, torch.nn.Module)
    for iteration in range(3):
        ours, theirs = (t.grpo_step(world.groups, world.pixels) for t in (own, apart))
        assert_close_metrics(ours, theirs)
        assert (ours["kl"] > 1e-4) == (iteration > 0)
    assert all(p.requires_grad for name, p in own.policy.hf.named_parameters() if ".lora_" in name)


def test_a_merger_that_is_trained_is_in_no_reference(world: TrainingData) -> None:
    trainer = adapted(world, lora=replace(ADAPTERS, train_merger=True), loss=LossConfig(kl_coef=0.1))
    assert isinstance(trainer.reference_logprobs, torch.nn.Module)


def test_recomputed_activations_give_the_same_gradients(world: TrainingData) -> None:
    plain, recomputing = (adapted(world, gradient_checkpointing=on) for on in (False, True))
    for _ in range(2):
        one, two = (t.sft_step(world.trajectories[:4], world.pixels) for t in (plain, recomputing))
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        assert one["grad_norm"] > 0


def test_two_ranks_under_zero_3_learn_what_one_learns(world: TrainingData, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    expected = adapters(Trainer(small_config(world.model, 0)), world, tmp_path / "one")
    got = two_ranks(world, tmp_path / "two", 3, "adapters")["adapters"]
    for step, metrics in expected.items():
        assert_close_metrics(got[step], metrics)
    one, two = (np.load(tmp_path / side / "learn-0.npz") for side in ("one", "two"))
    assert set(one.files) == set(two.files) == set(parameters(Trainer(small_config(world.model, 0))))
    for name in one.files:
        np.testing.assert_allclose(two[name], one[name], atol=2e-6, rtol=0, err_msg=name)
    read = [load_pretrained(tmp_path / side / "adapted", torch.float32) for side in ("one", "two")]
    for (name, a), (_, b) in zip(*(hf.named_parameters() for hf in read), strict=True):
        torch.testing.assert_close(b, a, atol=2e-6, rtol=0, msg=name)
    from safetensors.torch import load_file

    files = [load_file(tmp_path / s / "adapted/adapter/adapter_model.safetensors") for s in ("one", "two")]
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[0].items():
        torch.testing.assert_close(files[1][name], tensor, atol=2e-6, rtol=0, msg=name)


def test_dropout_is_for_updates_alone(world: TrainingData) -> None:
    trainer = taught(adapted(world, lora=replace(ADAPTERS, dropout=0.5)), world)
    rows = [trainer.compute_logprobs(world.trajectories, world.pixels) for _ in range(2)]
    assert gap(*rows) == 0.0
    losses = [adapted(world, lora=replace(ADAPTERS, dropout=p)) for p in (0.0, 0.5)]
    for one in losses:
        torch.manual_seed(0)
        taught(one, world, 2)
    torch.manual_seed(0)
    still, dropped = (one.sft_step(world.trajectories[:4], world.pixels)["loss"] for one in losses)
    assert still != dropped


def test_targets_are_ends_of_names_and_one_that_matches_nothing_is_named(world: TrainingData) -> None:
    trainer = adapted(
        world, lora=replace(ADAPTERS, target_modules=["v_proj", r"visual\.blocks\.\d+\.attn\.qkv"])
    )
    found = {n.split(".lora_A")[0] for n, _ in trainer.policy.hf.named_parameters() if ".lora_A." in n}
    assert {name.rpartition(".")[2] for name in found} == {"v_proj", "qkv"}
    with pytest.raises(
        UserError, match=r"learner\.lora\.targets has 'w_proj', which is the end of no linear"
    ):
        adapted(world, lora=replace(ADAPTERS, target_modules=["w_proj"]))


def test_a_checkpoint_brings_adapters_back(world: TrainingData, tmp_path: Path) -> None:
    trainer = taught(adapted(world), world)
    trainer.save_checkpoint(tmp_path / "checkpoint")
    again = adapted(world)
    again.load_checkpoint(tmp_path / "checkpoint")
    for one in (trainer, again):
        taught(one, world, 1)
    ours, theirs = parameters(trainer), parameters(again)
    assert [name for name in ours if not np.array_equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": {"dropout": 1.0}}, r"lora\.dropout is 1\.0"),
        ({"lora": {"rank": -1}}, r"lora\.rank is -1"),
        ({"lora": {"target_modules": ["("]}}, r"target_modules has '\('"),
        ({"lora": {"rank": 2, "target_modules": []}}, r"target_modules is empty"),
        ({"lora": {"train_merger": True}, "freeze_vision": True}, r"train_merger"),
    ],
)
def test_config_refuses_what_cannot_work(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnerConfig(**{**change, "lora": LoraConfig(**change["lora"])})
