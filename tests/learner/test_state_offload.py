"""Learner states in host memory: bit-for-bit equal training, checkpoints and weights from host memory."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.learner.rank_worker import parameters, small_config
from tests.learner.training_data import TrainingData
from vz_ray.config.learner import LoraConfig
from vz_ray.learner.checkpoint_files import ShardReader
from vz_ray.learner.state_offload import HostArena, StateOffloader, wait_for_memory
from vz_ray.learner.trainer import Trainer
from vz_ray.learner.zero_state import MOMENTS, WEIGHTS
from vz_ray.utils.errors import UserError

CASES = [
    pytest.param(0, {}, id="stage 0, whose weights stay mapped from the file on CPU", marks=pytest.mark.slow),
    pytest.param(1, {"dtype": "bfloat16"}, id="stage 1 in bfloat16"),
    pytest.param(2, {}, id="stage 2", marks=pytest.mark.slow),
    pytest.param(3, {"param_persistence_threshold": 100}, id="stage 3"),
    pytest.param(
        3, {"lora": LoraConfig(rank=2, publishes_adapters=True)}, id="adapters at stage 3", marks=pytest.mark.slow
    ),
]


def living_storages() -> dict[int, torch.UntypedStorage]:
    """Return the storages of all tensors of this process by identity, without scalars and meta tensors."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]
    return {s._cdata: s for s in storages if s.nbytes() >= 64 and s.resizable()}


def held_bytes(trainer: Trainer, others: dict[int, torch.UntypedStorage]) -> int:
    """Return the bytes of living tensors outside `others` and outside the trainer's host memory."""
    in_host_memory = (*trainer._offloader._arena._blocks, *trainer._snapshot._buffers.values())
    blocks = {block.untyped_storage()._cdata for block in in_host_memory}
    return sum(s.nbytes() for key, s in living_storages().items() if key not in others and key not in blocks)


def checkpoint_tensors(directory: Path) -> dict[str, torch.Tensor]:
    shards = ShardReader(directory)
    return {f"{kind} {name}": shards.read(kind, name) for kind in (WEIGHTS, *MOMENTS) for name in shards.shapes}


@pytest.mark.parametrize(("stage", "changes"), CASES)
def test_offloaded_states_continue_bit_for_bit(
    data: TrainingData, tmp_path: Path, stage: int, changes: dict[str, Any]
) -> None:
    config = small_config(data.model, stage, **changes)
    resident = Trainer(config)
    resident.grpo_step(data.groups, data.pixels)
    weights, published = parameters(resident), parameters(resident, resident.published_source())
    others = living_storages()
    moving = Trainer(config)
    moving.grpo_step(data.groups, data.pixels)
    all_bytes = held_bytes(moving, others)

    assert moving.offload_states(keep_weights=True) > 0
    np.testing.assert_equal(parameters(moving), weights)
    kept_bytes = held_bytes(moving, others)
    assert kept_bytes < all_bytes
    moved_bytes = moving.offload_states()
    left_bytes = held_bytes(moving, others)
    assert moved_bytes + left_bytes == kept_bytes
    assert left_bytes < all_bytes / 50, "more than the constants and cached results of libraries"
    assert moving.offload_states() == 0

    np.testing.assert_equal(parameters(moving), weights)  # gathered in host memory
    np.testing.assert_equal(parameters(moving, moving.published_source()), published)
    moving.save_checkpoint(tmp_path / "offloaded")
    resident.save_checkpoint(tmp_path / "resident")
    saved, expected = checkpoint_tensors(tmp_path / "offloaded"), checkpoint_tensors(tmp_path / "resident")
    assert saved.keys() == expected.keys()
    assert [name for name in saved if not torch.equal(saved[name], expected[name])] == []

    assert moving.load_states() > 0
    metrics = [trainer.grpo_step(data.groups, data.pixels) for trainer in (resident, moving)]
    first, second = (
        {name: value for name, value in row.items() if not name.endswith(("seconds", "per_second"))} for row in metrics
    )
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


def test_host_arena_has_exact_size_and_grows() -> None:
    arena = HostArena(is_pinned=False)
    for _ in range(2):
        first, second = arena.take([100, 30])
        assert (first.nbytes, second.nbytes) == (100, 30)
        assert second.data_ptr() - first.data_ptr() == 128
        (third,) = arena.take([64])
        assert [block.nbytes for block in arena._blocks] == [192, 64]
        arena.free()
    assert third.untyped_storage().nbytes() == 64
    arena.take([300])
    arena.free()
    assert [block.nbytes for block in arena._blocks] == [320]
    assert arena.take([]) == []


def test_load_waits_for_memory_of_a_killed_engine() -> None:
    free = iter([10, 10, 100])
    wait_for_memory(100, lambda: next(free), timeout_s=60.0)
    with pytest.raises(UserError, match=r"need 3\.00 GiB of GPU memory and 2\.50 are free after waiting 0 s"):
        wait_for_memory(3 << 30, lambda: 5 << 29, timeout_s=0.0)


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
