"""Checkpoints: what a run goes on from after SIGKILL anywhere, on other ranks, under another ZeRO stage."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.learner.crash_worker import CRASH_POINTS, POINTS_AFTER_SAVE, TrainingJob, read_output, run_job
from tests.learner.rank_worker import parameters, small_config, small_training_data
from tests.learner.training_data import TrainingData, small_model
from vz_ray.config.learner import LossConfig
from vz_ray.learner.checkpoint import (
    FORMAT,
    CheckpointError,
    get_rng_state,
    read_checkpoint_meta,
    seed_from_rank0,
)
from vz_ray.learner.checkpoint_files import INDEX, MANIFEST, ShardReader, commit, write_index, write_shards
from vz_ray.learner.trainer import Trainer
from vz_ray.learner.zero_state import MOMENTS, WEIGHTS, ParamSlice
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.training.state import LEARNER_DIR, latest_checkpoint

NO_KL = LossConfig(kl_coef=0.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return small_training_data(small_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def straight(world: TrainingData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight iterations of one rank without sharding, in one go; every checkpoint is kept."""
    job = TrainingJob(world.model, tmp_path_factory.mktemp("runs") / "straight", 8, keep=9)
    assert run_job(job) == [0], read_output(job)
    return job.run


def lines(run: Path, rank: int = 0) -> list[dict[str, Any]]:
    """What each iteration gave, the last time it was done."""
    read = [json.loads(line) for line in (run / f"lines-{rank}.jsonl").read_text().splitlines()]
    return list({line["iteration"]: line for line in read}.values())


def assert_same_weights(run: Path, other: Path) -> None:
    one, two = np.load(run / "weights.npz"), np.load(other / "weights.npz")
    assert [name for name in one.files if not np.array_equal(one[name], two[name])] == []


def content(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights and moments, whole."""
    shards = ShardReader(checkpoint)
    kinds = (WEIGHTS, *MOMENTS) if read_checkpoint_meta(checkpoint).updates else (WEIGHTS,)
    return {f"{kind} {name}": shards.read(kind, name) for kind in kinds for name in shards.shapes}


def assert_same_content(one: Path, two: Path) -> None:
    first, second = content(one), content(two)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert read_checkpoint_meta(one).steps == read_checkpoint_meta(two).steps
    assert read_checkpoint_meta(one).updates == read_checkpoint_meta(two).updates


def test_a_run_killed_at_every_point_of_saving_comes_to_the_same_end(
    world: TrainingData, straight: Path, tmp_path: Path
) -> None:
    """Each process goes on where the one before it was killed, and is killed at the next point."""
    run = RunDir(tmp_path / "run")
    for done, point in enumerate(CRASH_POINTS):
        job = TrainingJob(world.model, run.path, done + 1, crash_point=point)
        assert run_job(job) == [-9], read_output(job)
        left = latest_checkpoint(run)
        expected = done + 1 if point in POINTS_AFTER_SAVE else done
        assert (left.name if left else "none") == (f"step-{expected:06d}" if expected else "none"), point
        if left is not None:
            assert_same_content(left / LEARNER_DIR, straight / "checkpoints" / left.name / LEARNER_DIR)
    job = TrainingJob(world.model, run.path, len(CRASH_POINTS) + 1)
    assert run_job(job) == [0], read_output(job)
    assert lines(run.path) == lines(straight)
    assert_same_weights(run.path, straight)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000008"]


SHARDED = [
    pytest.param(3, 2, {"param_persistence_threshold": 100}, id="stage 3 on two ranks"),
    pytest.param(1, 1, {"dtype": "bfloat16"}, id="stage 1 in bfloat16"),
    pytest.param(2, 2, {"dtype": "bfloat16"}, id="stage 2 in bfloat16 on two ranks", marks=pytest.mark.slow),
    pytest.param(3, 2, {"dtype": "bfloat16"}, id="stage 3 in bfloat16 on two ranks", marks=pytest.mark.slow),
    pytest.param(1, 2, {}, id="stage 1 on two ranks", marks=pytest.mark.slow),
    pytest.param(0, 2, {}, id="stage 0 on two ranks", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("stage", "ranks", "changes"), SHARDED)
def test_three_steps_a_kill_and_three_more_are_six_in_one_go(
    world: TrainingData, tmp_path: Path, stage: int, ranks: int, changes: dict[str, Any]
) -> None:
    whole = TrainingJob(world.model, tmp_path / "whole", 6, stage, changes=changes)
    assert run_job(whole, ranks) == [0] * ranks, read_output(whole)
    first = TrainingJob(world.model, tmp_path / "cut", 4, stage, "while learning", changes=changes)
    assert run_job(first, ranks) == [-9] * ranks, read_output(first)
    then = TrainingJob(world.model, tmp_path / "cut", 6, stage, changes=changes)
    assert run_job(then, ranks) == [0] * ranks, read_output(then)
    for rank in range(ranks):
        assert lines(then.run, rank) == lines(whole.run, rank)
    assert_same_weights(then.run, whole.run)


PLACES = [
    (2, 2, {}),
    (0, 1, {}),
    (3, 2, {"param_persistence_threshold": 100}),
    (1, 1, {}),
    (2, 2, {}),
    (0, 2, {}),
]
"""ZeRO stage, ranks and settings of each iteration."""


def test_a_run_goes_on_from_ranks_to_ranks_and_stage_to_stage(
    world: TrainingData, straight: Path, tmp_path: Path
) -> None:
    """What is loaded is what was saved, bit for bit; what is learned is equal up to the order of sums."""
    run = RunDir(tmp_path / "run")
    for done, (stage, ranks, changes) in enumerate(PLACES):
        before = latest_checkpoint(run)
        job = TrainingJob(
            world.model, run.path, done + 1, stage, keep=9, copy_to=tmp_path / f"{done}", changes=changes
        )
        assert run_job(job, ranks) == [0] * ranks, read_output(job)
        if before is not None:
            assert_same_content(before / LEARNER_DIR, tmp_path / f"{done}")
            assert read_checkpoint_meta(tmp_path / f"{done}").world_size == ranks
    for line, expected in zip(lines(run.path), lines(straight), strict=False):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4, abs=1e-6)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    reached = content(run.checkpoints / "step-000006" / LEARNER_DIR)
    for name, tensor in content(straight / "checkpoints/step-000006" / LEARNER_DIR).items():
        torch.testing.assert_close(reached[name], tensor, atol=2e-6, rtol=1e-4, msg=name)


def trainer_of(world: TrainingData, stage: int, **changes: Any) -> Trainer:
    return Trainer(small_config(world.model, stage, **({"loss": NO_KL, "mini_batch_size": 8} | changes)))


def steps(trainer: Trainer, world: TrainingData, count: int) -> list[float]:
    return [trainer.sft_step(world.trajectories[:2], world.pixels)["loss"] for _ in range(count)]


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (1, {"dtype": "bfloat16"}),
        (2, {"dtype": "bfloat16"}),
        (2, {"offload": "optimizer"}),
        (3, {"dtype": "bfloat16", "param_persistence_threshold": 100}),
        (3, {"offload": "optimizer"}),
    ],
)
def test_dtype_and_offloading_may_change_and_the_masters_do_not(
    world: TrainingData, tmp_path: Path, stage: int, changes: dict[str, Any]
) -> None:
    plain = trainer_of(world, 0)
    steps(plain, world, 2)
    plain.save_checkpoint(tmp_path / "plain")
    other = trainer_of(world, stage, **changes)
    steps(other, world, 1)  # what it holds is replaced
    other.load_checkpoint(tmp_path / "plain")
    other.save_checkpoint(tmp_path / "other")
    assert_same_content(tmp_path / "plain", tmp_path / "other")
    dtype = next(other.policy.parameters()).dtype
    for name, value in parameters(other).items():
        master = ShardReader(tmp_path / "plain").read(WEIGHTS, name).to(dtype).float().numpy()
        assert np.array_equal(value.ravel(), master), name
    steps(other, world, 2)
    other.save_checkpoint(tmp_path / "later")
    straight = {name: values.copy() for name, values in parameters(other).items()}
    back = trainer_of(world, 0)
    back.load_checkpoint(tmp_path / "later")
    back.save_checkpoint(tmp_path / "back")
    assert_same_content(tmp_path / "later", tmp_path / "back")
    again = trainer_of(world, stage, **changes)
    again.load_checkpoint(tmp_path / "plain")
    steps(again, world, 2)
    assert [n for n, v in parameters(again).items() if not np.array_equal(v, straight[n])] == []


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_checkpoint_from_before_the_first_step_undoes_all_steps(
    world: TrainingData, tmp_path: Path, stage: int
) -> None:
    trainer = trainer_of(world, stage)
    trainer.save_checkpoint(tmp_path / "begun")
    losses = steps(trainer, world, 3)
    trainer.load_checkpoint(tmp_path / "begun")
    assert trainer.engine.steps == 0
    assert steps(trainer, world, 3) == losses


def test_a_frozen_tower_is_that_of_the_model_which_training_started_from(
    world: TrainingData, tmp_path: Path
) -> None:
    trainer = trainer_of(world, 0, freeze_vision=True)
    steps(trainer, world, 1)
    trainer.save_checkpoint(tmp_path / "frozen")
    assert not any("visual" in name for name in ShardReader(tmp_path / "frozen").shapes)
    with pytest.raises(CheckpointError, match=r"lacks model\.visual\..*, which is trained here"):
        trainer_of(world, 0).load_checkpoint(tmp_path / "frozen")
    moved = shutil.copytree(world.model, tmp_path / "moved")
    Trainer(small_config(moved, 0, loss=NO_KL, freeze_vision=True)).load_checkpoint(tmp_path / "frozen")
    other = small_model(tmp_path / "other")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    elsewhere = Trainer(small_config(other, 0, loss=NO_KL, freeze_vision=True))
    with pytest.raises(CheckpointError, match="other has other weights in the frozen parts"):
        elsewhere.load_checkpoint(tmp_path / "frozen")


def rewritten(checkpoint: Path, name: str, text: str) -> None:
    """Changes a file and seals the checkpoint anew, as one who knows how might."""
    (checkpoint / name).write_text(text)
    (checkpoint / MANIFEST).unlink()
    draft = checkpoint.rename(checkpoint.with_name("draft"))
    commit(draft, checkpoint, {"format": FORMAT})


def test_checkpoints_of_other_models_layouts_or_with_altered_manifests_change_nothing(
    world: TrainingData, tmp_path: Path
) -> None:
    trainer = trainer_of(world, 0)
    steps(trainer, world, 1)
    good = tmp_path / "good"
    trainer.save_checkpoint(good)
    before, index = parameters(trainer), json.loads((good / INDEX).read_text())

    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            trainer.load_checkpoint(good)
        assert all(np.array_equal(value, before[name]) for name, value in parameters(trainer).items())
        assert trainer.engine.steps == 1

    manifest = json.loads((good / MANIFEST).read_text())
    for altered in (
        manifest | {"metadata": {"format": 9}},
        manifest | {"files": dict(list(manifest["files"].items())[1:])},
        {"metadata": {"world_size": 1, "zero_stage": 0, "steps": 1}, "files": {}},
    ):
        (good / MANIFEST).write_text(json.dumps(altered))
        refused(f"{MANIFEST} of checkpoint .*good does not match its hash")
    (good / MANIFEST).write_text("{")
    refused("does not match its hash")

    name = next(iter(index["shapes"]))
    for shapes, match in (
        ({**index["shapes"], "more.weight": [1]}, r"it holds more\.weight, which is not trained here"),
        ({n: s for n, s in index["shapes"].items() if n != name}, f"it lacks {name}, which is trained"),
        ({**index["shapes"], name: [2, 3]}, rf"{name} has shape \[2, 3\] there and \["),
    ):
        rewritten(good, INDEX, json.dumps(index | {"shapes": shapes}))
        refused(match)
    rewritten(good, INDEX, json.dumps(index))
    trainer.load_checkpoint(good)
    shutil.move(good, tmp_path / "draft")
    commit(tmp_path / "draft", good, {"world": 1})
    refused("has format None; this version reads format 2")


def test_pieces_are_found_by_element_wherever_they_lie(tmp_path: Path) -> None:
    values = torch.arange(24.0)
    cuts = {"a": (2, 3), "b": (18,)}
    pieces = [ParamSlice("a", (2, 3), 0, 6), ParamSlice("b", (18,), 0, 7), ParamSlice("b", (18,), 7, 18)]
    offset = {"a": 0, "b": 6}

    def get(piece: ParamSlice, kind: str) -> torch.Tensor:
        return values[offset[piece.name] :][piece.start : piece.stop] * (1 if kind == WEIGHTS else -1)

    where = []
    for rank, part in enumerate((pieces[:2], pieces[2:])):
        where += write_shards(tmp_path, rank, WEIGHTS, part, get, shard_bytes=25)
    assert len({file for *_, file in where}) == 3
    write_index(tmp_path, cuts, where)
    shards = ShardReader(tmp_path)
    assert shards.read(WEIGHTS, "a").tolist() == values[:6].tolist()
    assert shards.read(WEIGHTS, "b", 5, 9).tolist() == [11.0, 12.0, 13.0, 14.0]
    assert shards.read(WEIGHTS, "b").tolist() == values[6:].tolist()
    for wrong in (where[:2], [*where, where[1]]):
        with pytest.raises(RuntimeError, match=r"weights of b \[18\] have slices .* overlap or leave a gap"):
            write_index(tmp_path, cuts, wrong)


def test_a_rank_without_a_saved_state_draws_from_rank_zeros_and_unlike_it() -> None:
    state, drawn = get_rng_state(), []
    for rank in (2, 3, 2):
        seed_from_rank0(state, rank)
        drawn.append((random.random(), float(np.random.rand()), torch.rand(1).item()))
    assert drawn[0] == drawn[2]
    assert drawn[0] != drawn[1]
