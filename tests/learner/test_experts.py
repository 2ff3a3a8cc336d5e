"""Learner of a model with experts: sharding, export, adapters, layout of checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.families.hf_configs import build_on_meta
from tests.learner.rank_worker import (
    assert_close_metrics,
    gradients,
    imageless,
    learn,
    parameters,
    run_two_ranks,
    small_config,
    small_training_data,
)
from tests.learner.test_trainer import assert_same_gradients
from tests.learner.training_data import TrainingData, small_model
from vz_ray.config.learner import LoraConfig, LossConfig
from vz_ray.families import load_hf_config
from vz_ray.learner.checkpoint_shapes import check_tensor_shapes, read_tensor_headers
from vz_ray.learner.lora import add_adapters
from vz_ray.learner.policy_model import PolicyModel, load_pretrained
from vz_ray.learner.trainer import Trainer
from vz_ray.utils.errors import UserError

EXPERTS = "model.language_model.layers.0.mlp.experts."
NO_MLP = [r"language_model\..*\.(q|k|v|o)_proj"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint whose first layer has experts."""
    return small_model(tmp_path_factory.mktemp("experts"), "qwen3_vl_moe")


@pytest.fixture(scope="module")
def data(model: Path) -> TrainingData:
    return small_training_data(model)


@pytest.mark.integration
def test_two_zero_3_ranks_match_one_rank(data: TrainingData, tmp_path: Path) -> None:
    """Gradients, SFT and GRPO steps. Ranks choose experts by their own tokens, and in one step one has no tokens."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    trainer = Trainer(small_config(data.model, 0))
    before = parameters(trainer)
    expected = {"learn": learn(trainer, data, one), "imageless": imageless(trainer, data, one)}
    gradients(Trainer(small_config(data.model, 0, share_prefixes=False)), data, one)
    got = run_two_ranks(data, two, 3, "gradients", "learn", "imageless")
    assert_same_gradients(two / "gradients-1.npz", one / "gradients-0.npz")
    for scenario, steps in expected.items():
        for step, metrics in steps.items():
            assert_close_metrics(got[scenario][step], metrics)
    single, double = (np.load(ranks / "learn-0.npz") for ranks in (one, two))
    assert set(single.files) == set(double.files) == set(before)
    for name in single.files:
        np.testing.assert_allclose(double[name], single[name], atol=2e-6, rtol=0, err_msg=name)
    for part in ("experts.gate_up_proj", "experts.down_proj", "gate.weight"):
        name = f"model.language_model.layers.0.mlp.{part}"
        assert np.abs(single[name] - before[name]).max() > 1e-4, f"{name} is not trained"


def test_export_has_the_layout_of_released_checkpoints(data: TrainingData, tmp_path: Path) -> None:
    trainer = Trainer(small_config(data.model, 0, loss=LossConfig(kl_coef=0.0)))
    trainer.sft_step(data.trajectories[:4], data.pixels)
    trainer.export_hf(tmp_path / "export")
    stored = {name: tensor.shape for name, tensor in read_tensor_headers(tmp_path / "export").items()}
    assert stored == {name: tensor.shape for name, tensor in read_tensor_headers(data.model).items()}
    assert stored[EXPERTS + "gate_up_proj"] == (8, 32, 48)
    assert [spec.shape for spec in trainer.weight_source().specs()] == [
        tensor.shape for tensor in parameters(trainer).values()
    ]
    exported = PolicyModel.from_pretrained(tmp_path / "export").hf
    for (name, a), b in zip(trainer.policy.hf.named_parameters(), exported.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_checkpoint_in_the_layout_of_transformers_is_refused(data: TrainingData, tmp_path: Path) -> None:
    shutil.copytree(data.model, tmp_path / "model")
    load_pretrained(data.model, torch.float32).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"experts\.\w+ as \[8, .*vLLM hold \[8, .*Exchange the last two dimensions"):
        check_tensor_shapes(tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    save_file(
        {name: t.transpose(1, 2).contiguous() if ".experts." in name else t for name, t in load_file(file).items()},
        file,
        metadata={"format": "pt"},
    )
    check_tensor_shapes(tmp_path / "model")


def test_adapters_leave_experts_and_router_frozen(data: TrainingData) -> None:
    trainer = Trainer(small_config(data.model, 0, lora=LoraConfig(rank=2), loss=LossConfig(kl_coef=0.0)))
    adapted = {name for name, p in trainer.policy.hf.named_parameters() if p.requires_grad}
    assert adapted
    assert not any("layers.0.mlp" in name for name in adapted)
    before = parameters(trainer)
    trainer.sft_step(data.trajectories[:4], data.pixels)
    after = parameters(trainer)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed
    assert not any("layers.0.mlp" in name for name in changed)


def test_adapters_of_missing_mlps_are_refused(data: TrainingData) -> None:
    """If every layer has experts, the default targets name no linear layer of an MLP."""
    config = load_hf_config(data.model)
    config.text_config.mlp_only_layers = []
    with pytest.raises(UserError, match=r"\(gate\|up\|down\)_proj.*matches no linear layer"):
        add_adapters(build_on_meta(config), LoraConfig(rank=2), "base", seed=0)
    add_adapters(build_on_meta(config), LoraConfig(rank=2, target_modules=NO_MLP), "base", seed=0)
