"""Updates with a non-finite loss or gradient: skipped on every rank, saved, replayed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.learner.rank_worker import (
    BAD_INDEX,
    different_weights,
    parameters,
    run_two_ranks,
    small_config,
    with_bad_trajectory,
)
from tests.learner.training_data import TrainingData
from vz_ray.config.learner import OptimizerConfig
from vz_ray.config.loss import LossConfig
from vz_ray.env.trajectory import Group
from vz_ray.learner.replay import BATCH, MODEL, STEP, SkippedBatch, describe_replay, replay_update
from vz_ray.learner.trainer import Trainer
from vz_ray.utils.errors import UserError

# A large epsilon: otherwise Adam amplifies the rounding noise of tiny gradients on a GPU.
COSINE = OptimizerConfig(learning_rate=1e-2, lr_schedule="cosine", total_steps=10, weight_decay=0.1, epsilon=1e-3)


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
def test_skipped_update_changes_no_state(
    default_device: torch.device, data: TrainingData, stage: int, dtype: str, changes: dict[str, Any]
) -> None:
    """The next update equals that of a run without the bad batch: bit for bit, on a GPU up to rounding."""
    tolerance = 0.0 if default_device.type == "cpu" else 1e-2
    settings = {"dtype": dtype, "optimizer": COSINE, "loss": LossConfig(kl_coef=0.0)} | changes
    trainer, other = (Trainer(small_config(data.model, stage, **settings)) for _ in range(2))
    good, bad = data.trajectories, with_bad_trajectory(data.trajectories)
    for current in (trainer, other):
        assert current.sft_step(good[:4], data.pixels)["skipped"] == 0
    before = parameters(trainer)
    for skipped in (1, 2):
        row = trainer.sft_step(bad, data.pixels)
        assert row["skipped"] == 1
        assert np.isnan(row["loss"])
        assert not np.isfinite(row["grad_norm"])
        assert (trainer.engine.steps, trainer.engine.consecutive_skips) == (1, skipped)
        assert_same(parameters(trainer), before)
    for _ in range(2):
        after, expected = (t.sft_step(good[4:8], data.pixels) for t in (trainer, other))
        for name in ("loss", "grad_norm", "learning_rate", "skipped"):
            assert after[name] == pytest.approx(expected[name], rel=tolerance, abs=0), name
    assert trainer.engine.consecutive_skips == 0
    assert different_weights(parameters(trainer), parameters(other), default_device) == []


def test_overflowing_gradient_with_finite_loss_is_skipped(data: TrainingData) -> None:
    """With an advantage of 1e38 the loss is finite and the gradient norm is not."""
    loss = LossConfig(kl_coef=0.0, entropy_coef=0.0, advantage_estimator="dr_grpo")
    trainer = Trainer(small_config(data.model, 0, loss=loss, mini_batch_size=1))
    before = parameters(trainer)
    row = trainer.grpo_step([with_huge_reward(data.groups[0])], data.pixels)
    assert np.isfinite(row["loss"])
    assert (row["skipped"], row["updates"], row["grad_norm"]) == (1, 0, float("inf"))
    assert_same(parameters(trainer), before)
    row = trainer.grpo_step([data.groups[1], with_huge_reward(data.groups[0])], data.pixels)
    assert (row["skipped"], row["updates"]) == (1, 1)
    assert np.isfinite(row["grad_norm"])


def with_huge_reward(group: Group) -> Group:
    """Set one reward close to the float32 maximum."""
    first, *rest = group.trajectories
    assert first.reward is not None
    return replace(group, trajectories=(replace(first, reward=replace(first.reward, total=3e38)), *rest))


@pytest.mark.parametrize("stage", [0, 3])
def test_bad_batch_on_one_rank_is_skipped_on_both(data: TrainingData, tmp_path: Path, stage: int) -> None:
    run_two_ranks(data, tmp_path, stage, "skip")
    reports = [json.loads((tmp_path / f"report-{rank}.json").read_text())["skip"] for rank in range(2)]
    for report in reports:
        assert report["skipped"] == [1, 0]
        assert report["changed"] == []
        assert report["steps"] == 1
    held = [report["held_bad_trajectories"] for report in reports]
    assert sorted(held) == [0, 1], "exactly one rank must hold the bad trajectory"
    batch = SkippedBatch.load(tmp_path / "replay" / "step-000000")
    assert (batch.meta.world_size, batch.meta.kind) == (2, "sft")
    assert not (tmp_path / "replay" / "step-000000-2").exists()


def test_consecutive_skips_end_training_and_replay_the_same(data: TrainingData, tmp_path: Path) -> None:
    settings = {
        "max_skipped_updates": 2,
        "replay_dir": str(tmp_path / "replay"),
        "loss": LossConfig(kl_coef=0.1),
    }
    trainer = Trainer(small_config(data.model, 0, **settings))
    good, (bad,) = data.groups[0], [replace(data.groups[1], trajectories=tuple(with_bad_trajectory(
        list(data.groups[1].trajectories)
    )))]  # fmt: skip
    assert trainer.grpo_step([good], data.pixels, weight_version=4)["skipped"] == 0
    assert trainer.grpo_step([bad], data.pixels, weight_version=5)["skipped"] == 1
    assert trainer.grpo_step([good], data.pixels, weight_version=5)["skipped"] == 0, (
        "an applied update resets the count"
    )
    assert trainer.grpo_step([bad], data.pixels, weight_version=6)["skipped"] == 1
    with pytest.raises(UserError, match=r"2 updates in a row .*learner\.max_skipped_updates.*vz-ray replay"):
        trainer.grpo_step([bad], data.pixels, weight_version=7)

    first, last = tmp_path / "replay" / "step-000001", tmp_path / "replay" / "step-000002-2"
    assert sorted(path.name for path in first.iterdir()) == [BATCH, STEP]
    assert sorted(path.name for path in last.iterdir()) == [BATCH, MODEL, STEP]
    batch = SkippedBatch.load(last)
    assert batch.config == trainer.config
    assert batch.trajectories == bad.trajectories
    assert (batch.meta.step, batch.meta.weight_version, batch.meta.kind) == (2, 7, "grpo")
    metrics, non_finite = replay_update(batch, data.pixels)
    assert metrics["skipped"] == 1
    assert np.isnan(metrics["loss"])
    assert non_finite == [str(bad.trajectories[BAD_INDEX].id)]
    lines = list(describe_replay(metrics, non_finite))
    assert lines[0] == "The update was skipped again."
    assert lines[-1].startswith(f"trajectory {non_finite[0]} has non-finite log-probs")


def test_replay_of_a_finite_batch_is_applied(data: TrainingData, tmp_path: Path) -> None:
    """The loss equals that of the saved trajectories."""
    from vz_ray.learner.distributed import RankInfo
    from vz_ray.learner.replay import SkippedUpdateMeta, save_skipped_batch

    config = small_config(data.model, 0, loss=LossConfig(kl_coef=0.0))
    trainer = Trainer(config)
    rank_info = RankInfo(0, 1, trainer.rank_info.device)
    directory = save_skipped_batch(
        tmp_path, data.trajectories, SkippedUpdateMeta("grpo", 0, None, 1.0, 1), config, rank_info
    )
    metrics, non_finite = replay_update(SkippedBatch.load(directory), data.pixels)
    expected = Trainer(replace(config, mini_batch_size=8)).grpo_step(data.groups, data.pixels)
    assert (metrics["skipped"], non_finite) == (0, [])
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_directory_without_a_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no batch of a skipped update"):
        SkippedBatch.load(tmp_path)
