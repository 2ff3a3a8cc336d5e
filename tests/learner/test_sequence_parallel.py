"""Sequences split over two ranks against whole sequences: loss and gradients of every family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from tests.learner.rank_worker import small_config
from tests.learner.shard_worker import CASES, run_shard
from tests.learner.test_shared_prefix import TOLERANCE, GradientCheck, assert_equal, remove_float32_rounding
from tests.learner.training_data import SMALL, TEXTS, small_model
from tests.planning.pass_memory import WIDE_SHAPES
from vz_ray.config import load_config
from vz_ray.config.fields import InvalidValueError
from vz_ray.config.learner import LearnerConfig
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.families import FAMILIES
from vz_ray.learner.distributed import RankInfo, init_distributed
from vz_ray.learner.sequence_parallel import SequenceShard
from vz_ray.needle.tiny_model import build_tiny_model
from vz_ray.planning.sequence_parallel import check_checkpoint_heads, check_sequence_parallel
from vz_ray.training.run import run_training
from vz_ray.training.sft import run_sft
from vz_ray.utils.errors import UserError


@pytest.fixture(scope="module", params=[*FAMILIES, "two key heads"])
def sharded_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each family, whose ranks share one key head; and one with a key head for each rank."""
    folder = tmp_path_factory.mktemp("model")
    if request.param in FAMILIES:
        return small_model(folder, request.param)
    return build_tiny_model(folder, TEXTS, config=replace(SMALL, num_heads=4, num_kv_heads=2))


@pytest.fixture(scope="module")
def rank_results(sharded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(run_shard, args=(sharded_model, folder), nprocs=2)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{str(d).split('.')[1]}-{n}" for d, n in CASES])
def test_sum_of_two_ranks_equals_the_whole_sequence(
    sharded_model: Path, rank_results: list[list[Any]], case: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups with shared prefixes, samples with 0 to 4 zooms, frames of different sizes, recomputed activations."""
    remove_float32_rounding(monkeypatch)
    dtype, _ = CASES[case]
    whole = GradientCheck(sharded_model, dtype)
    expected = whole.run_shared()
    (loss, gradients), (other_loss, other_gradients) = (results[case] for results in rank_results)
    assert loss == other_loss
    summed = {name: gradient + other_gradients[name] for name, gradient in gradients.items()}
    assert any(float(gradient.norm()) > 0 for name, gradient in other_gradients.items() if "visual" in name)
    # As in the test of shared prefixes: terms of the decay's bias cancel.
    cancels = whole.policy.shape.text.linear and dtype is torch.float32
    assert_equal((loss, summed), expected, 5e-3 if cancels else TOLERANCE[dtype])


def test_parts_of_a_sequence_have_equal_lengths() -> None:
    shards = [SequenceShard(rank, 4, None) for rank in range(4)]
    assert [shard.token_range(10) for shard in shards] == [(0, 3), (3, 6), (6, 9), (9, 12)]
    assert [shard.token_range(1) for shard in shards] == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_size_that_does_not_divide_the_heads_is_refused() -> None:
    shape = WIDE_SHAPES["qwen3_vl"]  # 6 heads, 2 key and value heads
    for size in (1, 2, 6):
        check_sequence_parallel(shape, size)
    with pytest.raises(UserError, match=r"6 attention heads. For this model, use one of \[1, 2\]"):
        check_sequence_parallel(shape, 4)
    with pytest.raises(UserError, match="neither a divisor nor a multiple of the model's 2 key"):
        check_sequence_parallel(shape, 3)
    linear = replace(WIDE_SHAPES["qwen3_5"], text=replace(WIDE_SHAPES["qwen3_5"].text, heads=8))
    with pytest.raises(UserError, match="does not divide the model's 2 linear key heads"):
        check_sequence_parallel(linear, 4)


def test_commands_check_the_heads_before_they_start(model: Path) -> None:
    """With the config.json alone; a model without one fails elsewhere."""
    learner = LearnerConfig(world_size=16, sequence_parallel_size=16)
    with pytest.raises(
        UserError, match="sequence_parallel_size is 16; it does not divide the model's 2 attention heads"
    ):
        check_checkpoint_heads(str(model), learner)
    check_checkpoint_heads(str(model), LearnerConfig(world_size=2, sequence_parallel_size=2))
    check_checkpoint_heads("nowhere", learner)
    overrides = [f"model={model}", "learner.world_size=16", "learner.sequence_parallel_size=16"]
    with pytest.raises(UserError, match="16; it does not divide"):
        run_training(load_config(GrpoRunConfig, None, overrides))
    with pytest.raises(UserError, match="16; it does not divide"):
        run_sft(load_config(SftRunConfig, None, [*overrides, "data=nowhere.json"]))


def test_size_that_does_not_divide_the_ranks_is_refused() -> None:
    with pytest.raises(InvalidValueError, match=r"is 2; it must divide world_size \(3\)"):
        small_config("nowhere", 0, world_size=3, sequence_parallel_size=2)
    with pytest.raises(UserError, match="sequence_parallel_size is 2; it does not divide the 1 ranks"):
        init_distributed(60.0, 2)


def test_ranks_of_a_sequence_compute_the_same_micro_batch() -> None:
    ranks = [RankInfo(rank, 4, torch.device("cpu"), SequenceShard(rank % 2, 2, None)) for rank in range(4)]
    assert [rank.batch_index for rank in ranks] == [0, 0, 1, 1]
    assert [rank.num_batches for rank in ranks] == [2] * 4
    assert [rank.reports_batch for rank in ranks] == [True, False, True, False]
