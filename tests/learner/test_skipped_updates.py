"""Updates whose loss or gradient is no finite number: skipped on every rank, kept, and played again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.learner.rank_worker import (
    BAD_INDEX,
    parameters,
    poisoned,
    small_config,
    small_training_data,
)
from tests.learner.test_trainer import two_ranks
from tests.learner.training_data import TrainingData, small_model
from vz_ray.config.learner import LossConfig, OptimizerConfig
from vz_ray.env.trajectory import Group
from vz_ray.learner.replay import BATCH, MODEL, STEP, SkippedBatch, describe_replay, replay_update
from vz_ray.learner.trainer import Trainer
from vz_ray.utils.errors import UserError

COSINE = OptimizerConfig(learning_rate=1e-2, lr_schedule="cosine", total_steps=10, weight_decay=0.1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return small_training_data(small_model(tmp_path_factory.mktemp("model")))


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert [name for name in expected if not np.array_equal(got[name], expected[name])] == []


@pytest.mark.parametrize(
    ("stage", "dtype", "changes"),
    [
        (0, "float32", {}),
        (1, "float32", {}),
        (1, "bfloat16", {}),
        (2, "bfloat16", {}),
        (1, "bfloat16", {"offload": "optimizer"}),
        (2, "bfloat16", {"offload": "optimizer"}),
        (2, "float32", {"offload": "optimizer"}),
        (3, "float32", {"param_persistence_threshold": 100_000}),
        (3, "bfloat16", {}),
        (3, "bfloat16", {"offload": "all"}),
    ],
)
def test_a_skipped_update_leaves_no_trace(
    world: TrainingData, stage: int, dtype: str, changes: dict[str, Any]
) -> None:
    """The next update is, bit for bit, what it is where the bad batch never was: weights, moments, rate."""
    settings = {"dtype": dtype, "optimizer": COSINE, "loss": LossConfig(kl_coef=0.0)} | changes
    trainer, other = (Trainer(small_config(world.model, stage, **settings)) for _ in range(2))
    good, bad = world.trajectories, poisoned(world.trajectories)
    for one in (trainer, other):
        assert one.sft_step(good[:4], world.pixels)["skipped"] == 0
    before = parameters(trainer)
    for skipped in (1, 2):
        row = trainer.sft_step(bad, world.pixels)
        assert row["skipped"] == 1
        assert np.isnan(row["loss"])
        assert not np.isfinite(row["grad_norm"])
        assert (trainer.engine.steps, trainer.engine.consecutive_skips) == (1, skipped)
        assert_same(parameters(trainer), before)
    for _ in range(2):
        after, expected = (one.sft_step(good[4:8], world.pixels) for one in (trainer, other))
        assert {name: after[name] for name in ("loss", "grad_norm", "learning_rate", "skipped")} == {
            name: expected[name] for name in ("loss", "grad_norm", "learning_rate", "skipped")
        }
    assert trainer.engine.consecutive_skips == 0
    assert_same(parameters(trainer), parameters(other))


def test_a_gradient_that_overflows_is_skipped_where_the_loss_does_not(world: TrainingData) -> None:
    """An advantage of 1e38: the loss is a number, the norm of its gradient is none."""
    loss = LossConfig(kl_coef=0.0, entropy_coef=0.0, advantage_estimator="dr_grpo")
    trainer = Trainer(small_config(world.model, 0, loss=loss, mini_batch_size=1))
    before = parameters(trainer)
    row = trainer.grpo_step([steep(world.groups[0])], world.pixels)
    assert np.isfinite(row["loss"])
    assert (row["skipped"], row["updates"], row["grad_norm"]) == (1, 0, float("inf"))
    assert_same(parameters(trainer), before)
    row = trainer.grpo_step([world.groups[1], steep(world.groups[0])], world.pixels)
    assert (row["skipped"], row["updates"]) == (1, 1)
    assert np.isfinite(row["grad_norm"])


def steep(group: Group) -> Group:
    """One of its rewards is out of all proportion."""
    first, *rest = group.trajectories
    assert first.reward is not None
    return replace(group, trajectories=(replace(first, reward=replace(first.reward, total=3e38)), *rest))


@pytest.mark.parametrize("stage", [0, 3])
def test_one_ranks_bad_batch_is_skipped_by_both(world: TrainingData, tmp_path: Path, stage: int) -> None:
    two_ranks(world, tmp_path, stage, "skip")
    reports = [json.loads((tmp_path / f"report-{rank}.json").read_text())["skip"] for rank in range(2)]
    for report in reports:
        assert report["skipped"] == [1, 0]
        assert report["changed"] == []
        assert report["steps"] == 1
    held = [report["held"] for report in reports]
    assert sorted(held) == [0, 1], "the bad trajectory must be on one rank alone"
    kept = SkippedBatch.load(tmp_path / "replay" / "step-000000")
    assert (kept.meta.world_size, kept.meta.kind) == (2, "sft")
    assert not (tmp_path / "replay" / "step-000000-2").exists()


def test_training_ends_after_some_in_a_row_and_the_batch_does_the_same_again(
    world: TrainingData, tmp_path: Path
) -> None:
    settings = {
        "max_skipped_updates": 2,
        "replay_dir": str(tmp_path / "replay"),
        "loss": LossConfig(kl_coef=0.1),
    }
    trainer = Trainer(small_config(world.model, 0, **settings))
    good, (bad,) = world.groups[0], [replace(world.groups[1], trajectories=tuple(poisoned(
        list(world.groups[1].trajectories)
    )))]  # fmt: skip
    assert trainer.grpo_step([good], world.pixels, weight_version=4)["skipped"] == 0
    assert trainer.grpo_step([bad], world.pixels, weight_version=5)["skipped"] == 1
    assert trainer.grpo_step([good], world.pixels, weight_version=5)["skipped"] == 0, (
        "a good one ends the row"
    )
    assert trainer.grpo_step([bad], world.pixels, weight_version=6)["skipped"] == 1
    with pytest.raises(UserError, match=r"2 updates in a row .*learner\.max_skipped_updates.*vz-ray replay"):
        trainer.grpo_step([bad], world.pixels, weight_version=7)

    first, last = tmp_path / "replay" / "step-000001", tmp_path / "replay" / "step-000002-2"
    assert sorted(path.name for path in first.iterdir()) == [BATCH, STEP]
    assert sorted(path.name for path in last.iterdir()) == [BATCH, MODEL, STEP]
    kept = SkippedBatch.load(last)
    assert kept.config == trainer.config
    assert kept.trajectories == bad.trajectories
    assert (kept.meta.step, kept.meta.weight_version, kept.meta.kind) == (2, 7, "grpo")
    metrics, broken = replay_update(kept, world.pixels)
    assert metrics["skipped"] == 1
    assert np.isnan(metrics["loss"])
    assert broken == [str(bad.trajectories[BAD_INDEX].id)]
    lines = list(describe_replay(metrics, broken))
    assert lines[0] == "The update was skipped again."
    assert lines[-1].startswith(f"trajectory {broken[0]} has non-finite log-probs")


def test_a_batch_that_is_whole_is_carried_out_when_it_is_played_again(
    world: TrainingData, tmp_path: Path
) -> None:
    """What is read back is the batch itself: its loss is that of the trajectories it was made of."""
    from vz_ray.learner.distributed import RankInfo
    from vz_ray.learner.replay import SkippedUpdateMeta, save_skipped_batch

    config = small_config(world.model, 0, loss=LossConfig(kl_coef=0.0))
    trainer = Trainer(config)
    place = RankInfo(0, 1, trainer.rank_info.device)
    where = save_skipped_batch(
        tmp_path, world.trajectories, SkippedUpdateMeta("grpo", 0, None, 1.0, 1), config, place
    )
    metrics, broken = replay_update(SkippedBatch.load(where), world.pixels)
    expected = Trainer(replace(config, mini_batch_size=8)).grpo_step(world.groups, world.pixels)
    assert (metrics["skipped"], broken) == (0, [])
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_what_is_no_kept_batch_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no batch of a skipped update"):
        SkippedBatch.load(tmp_path)
