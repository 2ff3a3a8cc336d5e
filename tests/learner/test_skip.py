"""Updates whose loss or gradient is no finite number: skipped on every rank, kept, and played again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.learner.rank_worker import (
    CLIFF,
    parameters,
    poisoned,
    small_config,
    small_world,
)
from tests.learner.test_trainer import two_ranks
from tests.learner.worlds import World, small_model
from vz_ray.config.learner import LossConfig, OptimizerConfig
from vz_ray.episode.trajectory import Group
from vz_ray.learner.replay import BATCH, MODEL, STEP, Kept, replay, told
from vz_ray.learner.trainer import Trainer
from vz_ray.observe.errors import UserError

COSINE = OptimizerConfig(learning_rate=1e-2, schedule="cosine", total_steps=10, weight_decay=0.1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return small_world(small_model(tmp_path_factory.mktemp("model")))


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
        (3, "float32", {"zero_keep_whole": 100_000}),
        (3, "bfloat16", {}),
        (3, "bfloat16", {"offload": "all"}),
    ],
)
def test_a_skipped_update_leaves_no_trace(
    world: World, stage: int, dtype: str, changes: dict[str, Any]
) -> None:
    """The next update is, bit for bit, what it is where the bad batch never was: weights, moments, rate."""
    settings = {"dtype": dtype, "optimizer": COSINE, "loss": LossConfig(kl=0.0)} | changes
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
        assert (trainer.engine.steps, trainer.engine.skipped) == (1, skipped)
        assert_same(parameters(trainer), before)
    for _ in range(2):
        after, expected = (one.sft_step(good[4:8], world.pixels) for one in (trainer, other))
        assert {name: after[name] for name in ("loss", "grad_norm", "learning_rate", "skipped")} == {
            name: expected[name] for name in ("loss", "grad_norm", "learning_rate", "skipped")
        }
    assert trainer.engine.skipped == 0
    assert_same(parameters(trainer), parameters(other))


def test_a_gradient_that_overflows_is_skipped_where_the_loss_does_not(world: World) -> None:
    """An advantage of 1e38: the loss is a number, the norm of its gradient is none."""
    loss = LossConfig(kl=0.0, entropy=0.0, advantage="dr_grpo")
    trainer = Trainer(small_config(world.model, 0, loss=loss, minibatch_tasks=1))
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
def test_one_ranks_bad_batch_is_skipped_by_both(world: World, tmp_path: Path, stage: int) -> None:
    two_ranks(world, tmp_path, stage, "skip")
    reports = [json.loads((tmp_path / f"report-{rank}.json").read_text())["skip"] for rank in range(2)]
    for report in reports:
        assert report["skipped"] == [1, 0]
        assert report["changed"] == []
        assert report["steps"] == 1
    held = [report["held"] for report in reports]
    assert sorted(held) == [0, 1], "the bad trajectory must be on one rank alone"
    kept = Kept.load(tmp_path / "replay" / "step-000000")
    assert (kept.facts.world, kept.facts.kind) == (2, "sft")
    assert not (tmp_path / "replay" / "step-000000-2").exists()


def test_training_ends_after_some_in_a_row_and_the_batch_does_the_same_again(
    world: World, tmp_path: Path
) -> None:
    settings = {"max_skipped": 2, "replay": str(tmp_path / "replay"), "loss": LossConfig(kl=0.1)}
    trainer = Trainer(small_config(world.model, 0, **settings))
    good, (bad,) = world.groups[0], [replace(world.groups[1], trajectories=tuple(poisoned(
        list(world.groups[1].trajectories)
    )))]  # fmt: skip
    assert trainer.grpo_step([good], world.pixels, version=4)["skipped"] == 0
    assert trainer.grpo_step([bad], world.pixels, version=5)["skipped"] == 1
    assert trainer.grpo_step([good], world.pixels, version=5)["skipped"] == 0, "a good one ends the row"
    assert trainer.grpo_step([bad], world.pixels, version=6)["skipped"] == 1
    with pytest.raises(UserError, match=r"2 updates in a row .*learner\.max_skipped.*vz-ray replay"):
        trainer.grpo_step([bad], world.pixels, version=7)

    first, last = tmp_path / "replay" / "step-000001", tmp_path / "replay" / "step-000002-2"
    assert sorted(path.name for path in first.iterdir()) == [BATCH, STEP]
    assert sorted(path.name for path in last.iterdir()) == [BATCH, MODEL, STEP]
    kept = Kept.load(last)
    assert kept.config == trainer.config
    assert kept.trajectories == bad.trajectories
    assert (kept.facts.step, kept.facts.version, kept.facts.kind) == (2, 7, "grpo")
    metrics, broken = replay(kept, world.pixels)
    assert metrics["skipped"] == 1
    assert np.isnan(metrics["loss"])
    assert broken == [str(bad.trajectories[CLIFF].id)]
    lines = list(told(metrics, broken))
    assert lines[0] == "the update was skipped again"
    assert lines[-1].startswith(f"trajectory {broken[0]} has log-probs")


def test_a_batch_that_is_whole_is_carried_out_when_it_is_played_again(world: World, tmp_path: Path) -> None:
    """What is read back is the batch itself: its loss is that of the trajectories it was made of."""
    from vz_ray.learner.distributed import Place
    from vz_ray.learner.replay import Facts, keep_batch

    config = small_config(world.model, 0, loss=LossConfig(kl=0.0))
    trainer = Trainer(config)
    place = Place(0, 1, trainer.place.device)
    where = keep_batch(tmp_path, world.trajectories, Facts("grpo", 0, None, 1.0, 1), config, place)
    metrics, broken = replay(Kept.load(where), world.pixels)
    expected = Trainer(replace(config, minibatch_tasks=8)).grpo_step(world.groups, world.pixels)
    assert (metrics["skipped"], broken) == (0, [])
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_what_is_no_kept_batch_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no batch of a skipped update"):
        Kept.load(tmp_path)
