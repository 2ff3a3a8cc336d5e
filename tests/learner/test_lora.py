"""LoRA adapters: trained parameters, published weights, exports."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.learner.rank_worker import (
    ADAPTERS,
    adapters,
    assert_close_metrics,
    parameters,
    run_two_ranks,
    small_config,
)
from tests.learner.training_data import TrainingData
from vz_ray.config.learner import LearnerConfig, LoraConfig, OptimizerConfig
from vz_ray.config.loss import LossConfig
from vz_ray.learner.policy_model import PolicyModel, load_pretrained
from vz_ray.learner.trainer import Trainer
from vz_ray.utils.errors import UserError

FAST = OptimizerConfig(learning_rate=2e-2, weight_decay=0.0)


def lora_trainer(data: TrainingData, stage: int = 0, lora: LoraConfig = ADAPTERS, **changes: Any) -> Trainer:
    settings = {"lora": lora, "optimizer": FAST, "loss": LossConfig(kl_coef=0.0)} | changes
    return Trainer(small_config(data.model, stage, **settings))


def max_difference(first: list[np.ndarray], second: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(first, second, strict=True))


def train_sft(trainer: Trainer, data: TrainingData, steps: int = 3) -> Trainer:
    for _ in range(steps):
        trainer.sft_step(data.trajectories[:4], data.pixels)
    return trainer


def test_new_adapters_do_not_change_the_policy(data: TrainingData) -> None:
    plain = Trainer(small_config(data.model, 0, loss=LossConfig(kl_coef=0.0)))
    expected = plain.compute_logprobs(data.trajectories, data.pixels)
    assert max_difference(lora_trainer(data).compute_logprobs(data.trajectories, data.pixels), expected) == 0.0


@pytest.mark.parametrize("lora", [ADAPTERS, replace(ADAPTERS, train_merger=True)], ids=["text", "merger"])
def test_sft_changes_adapters_and_the_optional_merger_only(data: TrainingData, lora: LoraConfig) -> None:
    trainer = lora_trainer(data, lora=lora)
    before = {name: p.detach().clone() for name, p in trainer.policy.hf.named_parameters()}
    losses = [trainer.sft_step(data.trajectories[:4], data.pixels)["loss"] for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1
    after = dict(trainer.policy.hf.named_parameters())
    changed = {name for name, p in before.items() if not torch.equal(p, after[name])}
    ours = {name for name in before if ".lora_" in name}
    assert len(ours) == 2 * 7 * trainer.policy.hf.config.get_text_config().num_hidden_layers
    assert changed == ours | ({name for name in before if ".merger." in name} if lora.train_merger else set())


def test_published_weights_are_merged_under_base_names(
    data: TrainingData,
) -> None:
    trainer = train_sft(lora_trainer(data), data)
    before = {name: p.detach().clone() for name, p in trainer.policy.hf.named_parameters()}
    merged, source = parameters(trainer), trainer.weight_source()
    base = dict(PolicyModel.from_pretrained(data.model).hf.named_parameters())
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


def test_published_adapters_add_up_to_the_merged_weights(data: TrainingData) -> None:
    trainer = train_sft(lora_trainer(data, lora=replace(ADAPTERS, publishes_adapters=True)), data)
    source, merged = trainer.published_source(), parameters(trainer)
    adapters = parameters(trainer, source)
    assert {spec.name: spec.shape for spec in source.specs()} == {name: a.shape for name, a in adapters.items()}
    base = dict(PolicyModel.from_pretrained(data.model).hf.named_parameters())
    layers = [name.removesuffix(".lora_A.weight") for name in adapters if name.endswith(".lora_A.weight")]
    assert len(adapters) == 2 * len(layers)
    for layer in layers:
        delta = adapters[f"{layer}.lora_B.weight"] @ adapters[f"{layer}.lora_A.weight"]
        weight = base[f"{layer}.weight"].detach().numpy() + delta
        np.testing.assert_allclose(merged[f"{layer}.weight"], weight, atol=1e-6, rtol=0, err_msg=layer)
    changed = {name for name, weight in base.items() if not np.array_equal(weight.detach().numpy(), merged[name])}
    assert changed == {f"{layer}.weight" for layer in layers}


@pytest.mark.parametrize("lora", [ADAPTERS, replace(ADAPTERS, train_merger=True)], ids=["text", "merger"])
def test_export_equals_policy_merged_and_as_peft_adapter(data: TrainingData, tmp_path: Path, lora: LoraConfig) -> None:
    from peft import PeftModel

    trainer = train_sft(lora_trainer(data, lora=lora), data)
    trainer.export_hf(tmp_path / "export")
    expected = trainer.compute_logprobs(data.trajectories, data.pixels)
    merged = Trainer(small_config(tmp_path / "export", 0, loss=LossConfig(kl_coef=0.0)))
    assert max_difference(merged.compute_logprobs(data.trajectories, data.pixels), expected) <= 1e-5
    untrained = Trainer(small_config(data.model, 0, loss=LossConfig(kl_coef=0.0)))
    assert max_difference(untrained.compute_logprobs(data.trajectories, data.pixels), expected) > 1e-2

    base = load_pretrained(data.model, torch.float32)
    peft_model = PeftModel.from_pretrained(base, str(tmp_path / "export" / "adapter")).merge_and_unload()
    theirs = dict(peft_model.named_parameters())
    for name, tensor in parameters(trainer).items():
        np.testing.assert_allclose(theirs[name].detach().numpy(), tensor, atol=1e-6, rtol=0, err_msg=name)
    settings = json.loads((tmp_path / "export" / "adapter" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["r"]) == (str(data.model), 4)


def test_reference_is_the_policy_without_adapters(data: TrainingData, tmp_path: Path) -> None:
    """Compare with a separate reference model, loaded from a copy of the checkpoint."""
    shutil.copytree(data.model, tmp_path / "copy")
    loss = LossConfig(kl_coef=0.1)
    own = lora_trainer(data, loss=loss)
    apart = lora_trainer(data, loss=loss, reference_model=str(tmp_path / "copy"))
    assert own.reference_logprobs == own._base_logprobs
    assert isinstance(apart.reference_logprobs, torch.nn.Module)
    for step in range(3):
        ours, theirs = (t.grpo_step(data.groups, data.pixels) for t in (own, apart))
        assert_close_metrics(ours, theirs)
        assert (ours["kl"] > 1e-4) == (step > 0)
    assert all(p.requires_grad for name, p in own.policy.hf.named_parameters() if ".lora_" in name)


def test_trained_merger_needs_a_separate_reference(data: TrainingData) -> None:
    trainer = lora_trainer(data, lora=replace(ADAPTERS, train_merger=True), loss=LossConfig(kl_coef=0.1))
    assert isinstance(trainer.reference_logprobs, torch.nn.Module)


@pytest.mark.usefixtures("default_device")
@pytest.mark.parametrize(("stage", "dtype", "tolerance"), [(0, "float32", 1e-5), (2, "bfloat16", 1e-2)])
def test_gradient_checkpointing_keeps_gradients(data: TrainingData, stage: int, dtype: str, tolerance: float) -> None:
    plain, recomputing = (lora_trainer(data, stage, gradient_checkpointing=on, dtype=dtype) for on in (False, True))
    for _ in range(2):
        expected, actual = (t.sft_step(data.trajectories[:4], data.pixels) for t in (plain, recomputing))
        assert actual["grad_norm"] == pytest.approx(expected["grad_norm"], rel=tolerance)
        assert expected["grad_norm"] > 0


@pytest.mark.parametrize(("stage", "shards"), [(3, 1), (2, 2)])
def test_two_ranks_match_one_rank(data: TrainingData, tmp_path: Path, stage: int, shards: int) -> None:
    """Under ZeRO-3, and under ZeRO-2 with sequences that both ranks share."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    expected = adapters(Trainer(small_config(data.model, 0)), data, tmp_path / "one")
    got = run_two_ranks(data, tmp_path / "two", stage, "adapters", sequence_parallel=shards)["adapters"]
    for step, metrics in expected.items():
        assert_close_metrics(got[step], metrics)
    single, double = (np.load(tmp_path / side / "published-0.npz") for side in ("one", "two"))
    assert set(single.files) == set(double.files)
    for name in single.files:
        np.testing.assert_allclose(double[name], single[name], atol=2e-6, rtol=0, err_msg=name)
    single, double = (np.load(tmp_path / side / "learn-0.npz") for side in ("one", "two"))
    assert set(single.files) == set(double.files) == set(parameters(Trainer(small_config(data.model, 0))))
    for name in single.files:
        np.testing.assert_allclose(double[name], single[name], atol=2e-6, rtol=0, err_msg=name)
    exported = [load_pretrained(tmp_path / side / "adapted", torch.float32) for side in ("one", "two")]
    for (name, a), (_, b) in zip(*(hf.named_parameters() for hf in exported), strict=True):
        torch.testing.assert_close(b, a, atol=2e-6, rtol=0, msg=name)
    from safetensors.torch import load_file

    files = [load_file(tmp_path / s / "adapted/adapter/adapter_model.safetensors") for s in ("one", "two")]
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[0].items():
        torch.testing.assert_close(files[1][name], tensor, atol=2e-6, rtol=0, msg=name)


def test_dropout_is_active_in_updates_only(data: TrainingData) -> None:
    trainer = train_sft(lora_trainer(data, lora=replace(ADAPTERS, dropout=0.5)), data)
    rows = [trainer.compute_logprobs(data.trajectories, data.pixels) for _ in range(2)]
    assert max_difference(*rows) == 0.0
    trainers = [lora_trainer(data, lora=replace(ADAPTERS, dropout=p)) for p in (0.0, 0.5)]
    for trainer in trainers:
        torch.manual_seed(0)
        train_sft(trainer, data, 2)
    torch.manual_seed(0)
    without, with_dropout = (t.sft_step(data.trajectories[:4], data.pixels)["loss"] for t in trainers)
    assert without != with_dropout


def test_targets_match_name_suffixes(data: TrainingData) -> None:
    trainer = lora_trainer(data, lora=replace(ADAPTERS, target_modules=["v_proj", r"visual\.blocks\.\d+\.attn\.qkv"]))
    layers = {n.split(".lora_A")[0] for n, _ in trainer.policy.hf.named_parameters() if ".lora_A." in n}
    assert {name.rpartition(".")[2] for name in layers} == {"v_proj", "qkv"}
    with pytest.raises(UserError, match=r"learner\.lora\.target_modules has 'w_proj', which matches no linear layer"):
        lora_trainer(data, lora=replace(ADAPTERS, target_modules=["w_proj"]))


def test_checkpoint_restores_adapters(data: TrainingData, tmp_path: Path) -> None:
    trainer = train_sft(lora_trainer(data), data)
    trainer.save_checkpoint(tmp_path / "checkpoint")
    again = lora_trainer(data)
    again.load_checkpoint(tmp_path / "checkpoint")
    for current in (trainer, again):
        train_sft(current, data, 1)
    ours, theirs = parameters(trainer), parameters(again)
    assert [name for name in ours if not np.array_equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": {"dropout": 1.0}}, r"dropout is 1\.0"),
        ({"lora": {"rank": -1}}, r"rank is -1"),
        ({"lora": {"target_modules": ["("]}}, r"target_modules has '\('"),
        ({"lora": {"rank": 2, "target_modules": []}}, r"target_modules is empty"),
        ({"lora": {"train_merger": True}, "freeze_vision": True}, r"train_merger"),
    ],
)
def test_config_refuses_invalid_values(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnerConfig(**{**change, "lora": LoraConfig(**change["lora"])})
