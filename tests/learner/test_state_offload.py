"""Learner states in host memory: bit-for-bit equal training, checkpoints and weights from host memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.learner.rank_worker import parameters, small_config
from tests.learner.training_data import TrainingData
from vz_ray.config.learner import LoraConfig
from vz_ray.learner.checkpoint_files import ShardReader
from vz_ray.learner.state_offload import StateOffloader, find_tensors
from vz_ray.learner.trainer import Trainer
from vz_ray.learner.zero_state import MOMENTS, WEIGHTS

CASES = [
    pytest.param(0, {}, id="stage 0, whose weights stay mapped from the file on CPU", marks=pytest.mark.slow),
    pytest.param(1, {"dtype": "bfloat16"}, id="stage 1 in bfloat16"),
    pytest.param(2, {}, id="stage 2", marks=pytest.mark.slow),
    pytest.param(3, {"param_persistence_threshold": 100}, id="stage 3"),
    pytest.param(3, {"lora": LoraConfig(rank=2)}, id="adapters at stage 3", marks=pytest.mark.slow),
]


def held_bytes(trainer: Trainer) -> int:
    """Return the bytes of all states that are not in host memory, without scalars."""
    engine = trainer.engine.deepspeed
    roots = [engine.module, engine.optimizer, engine.basic_optimizer, trainer.reference_logprobs]
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in find_tensors(roots) if t.device.type == "cpu"}
    return sum(storage.nbytes() for storage in storages.values() if storage.nbytes() >= 64 and storage.resizable())


def checkpoint_tensors(directory: Path) -> dict[str, torch.Tensor]:
    shards = ShardReader(directory)
    return {f"{kind} {name}": shards.read(kind, name) for kind in (WEIGHTS, *MOMENTS) for name in shards.shapes}


@pytest.mark.parametrize(("stage", "changes"), CASES)
def test_offloaded_states_continue_bit_for_bit(
    data: TrainingData, tmp_path: Path, stage: int, changes: dict[str, Any]
) -> None:
    config = small_config(data.model, stage, **changes)
    resident, moving = Trainer(config), Trainer(config)
    for trainer in (resident, moving):
        trainer.grpo_step(data.groups, data.pixels)

    weights = parameters(resident)
    assert moving.offload_states(keep_weights=True) > 0
    np.testing.assert_equal(parameters(moving), weights)
    kept_bytes = held_bytes(moving)
    assert kept_bytes < held_bytes(resident)
    assert moving.offload_states() == kept_bytes
    assert held_bytes(moving) == 0
    assert moving.offload_states() == 0

    np.testing.assert_equal(parameters(moving), weights)  # gathered in host memory
    moving.save_checkpoint(tmp_path / "offloaded")
    resident.save_checkpoint(tmp_path / "resident")
    saved, expected = checkpoint_tensors(tmp_path / "offloaded"), checkpoint_tensors(tmp_path / "resident")
    assert saved.keys() == expected.keys()
    assert [name for name in saved if not torch.equal(saved[name], expected[name])] == []

    assert moving.load_states() > 0
    timings = ("seconds", "tokens_per_second")
    metrics = [trainer.grpo_step(data.groups, data.pixels) for trainer in (resident, moving)]
    first, second = ({name: value for name, value in row.items() if name not in timings} for row in metrics)
    assert first == second
    np.testing.assert_equal(parameters(moving), parameters(resident))


def test_host_buffers_are_reused_and_views_stay_valid() -> None:
    module = torch.nn.Linear(64, 64, bias=False)
    row = module.weight.detach()[3]
    expected = row.clone()
    offloader = StateOffloader(module, [], torch.device("cpu"))
    buffers = set()
    for _ in range(3):
        offloader.offload()
        assert module.weight.untyped_storage().nbytes() == 0
        assert torch.equal(offloader.on_host(row), expected)
        buffers.add(offloader.on_host(row).untyped_storage().data_ptr())
        offloader.load()
        assert torch.equal(row, expected)
    assert len(buffers) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [1, 3])
def test_gpu_is_empty_while_states_are_offloaded(data: TrainingData, stage: int) -> None:
    before = torch.cuda.memory_allocated()
    trainer = Trainer(small_config(data.model, stage, dtype="bfloat16"))
    trainer.grpo_step(data.groups, data.pixels)
    weights = parameters(trainer)
    for _ in range(2):
        trainer.offload_states(keep_weights=True)
        np.testing.assert_equal(parameters(trainer), weights)
        trainer.offload_states()
        assert torch.cuda.memory_allocated() - before < 2**20
        np.testing.assert_equal(parameters(trainer), weights)
        trainer.load_states()
        np.testing.assert_equal(parameters(trainer), weights)
    trainer.grpo_step(data.groups, data.pixels)
