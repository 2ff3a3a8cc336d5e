"""Checkpoints: resume after SIGKILL at any point, on another number of ranks, under another ZeRO stage."""

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
from tests.learner.rank_worker import different_weights, parameters, small_config
from tests.learner.training_data import TrainingData, small_model
from vz_ray.config.loss import LossConfig
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
def uninterrupted_run(data: TrainingData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps on one rank without sharding that keeps every checkpoint."""
    job = TrainingJob(data.model, tmp_path_factory.mktemp("runs") / "straight", 8, keep=9)
    assert run_job(job) == [0], read_output(job)
    return job.run


def lines(run: Path, rank: int = 0) -> list[dict[str, Any]]:
    """Return the last line of each step."""
    read = [json.loads(line) for line in (run / f"lines-{rank}.jsonl").read_text().splitlines()]
    return list({line["iteration"]: line for line in read}.values())


def assert_same_weights(run: Path, other: Path) -> None:
    first, second = np.load(run / "weights.npz"), np.load(other / "weights.npz")
    assert [name for name in first.files if not np.array_equal(first[name], second[name])] == []


def read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return whole weights and moments."""
    shards = ShardReader(checkpoint)
    kinds = (WEIGHTS, *MOMENTS) if read_checkpoint_meta(checkpoint).updates else (WEIGHTS,)
    return {f"{kind} {name}": shards.read(kind, name) for kind in kinds for name in shards.shapes}


def assert_same_content(left: Path, right: Path) -> None:
    first, second = read_tensors(left), read_tensors(right)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert read_checkpoint_meta(left).steps == read_checkpoint_meta(right).steps
    assert read_checkpoint_meta(left).updates == read_checkpoint_meta(right).updates


def test_run_killed_at_every_point_of_a_save_ends_the_same(
    data: TrainingData, uninterrupted_run: Path, tmp_path: Path
) -> None:
    """Each process resumes after the previous crash and crashes at the next point."""
    run = RunDir(tmp_path / "run")
    for done, point in enumerate(CRASH_POINTS):
        job = TrainingJob(data.model, run.path, done + 1, crash_point=point)
        assert run_job(job) == [-9], read_output(job)
        left = latest_checkpoint(run)
        expected = done + 1 if point in POINTS_AFTER_SAVE else done
        assert (left.name if left else "none") == (f"step-{expected:06d}" if expected else "none"), point
        if left is not None:
            assert_same_content(left / LEARNER_DIR, uninterrupted_run / "checkpoints" / left.name / LEARNER_DIR)
    job = TrainingJob(data.model, run.path, len(CRASH_POINTS) + 1)
    assert run_job(job) == [0], read_output(job)
    assert lines(run.path) == lines(uninterrupted_run)
    assert_same_weights(run.path, uninterrupted_run)
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
def test_resumed_run_equals_uninterrupted_run(
    data: TrainingData, tmp_path: Path, stage: int, ranks: int, changes: dict[str, Any]
) -> None:
    whole = TrainingJob(data.model, tmp_path / "whole", 6, stage, changes=changes)
    assert run_job(whole, ranks) == [0] * ranks, read_output(whole)
    first = TrainingJob(data.model, tmp_path / "cut", 4, stage, "during the step", changes=changes)
    assert run_job(first, ranks) == [-9] * ranks, read_output(first)
    then = TrainingJob(data.model, tmp_path / "cut", 6, stage, changes=changes)
    assert run_job(then, ranks) == [0] * ranks, read_output(then)
    for rank in range(ranks):
        assert lines(then.run, rank) == lines(whole.run, rank)
    assert_same_weights(then.run, whole.run)


LAYOUTS = [
    (2, 2, {}),
    (0, 1, {}),
    (3, 2, {"param_persistence_threshold": 100}),
    (1, 1, {}),
    (2, 2, {}),
    (0, 2, {}),
]
"""ZeRO stage, world size and config changes of each step."""


def test_resume_with_other_world_size_and_zero_stage(
    data: TrainingData, uninterrupted_run: Path, tmp_path: Path
) -> None:
    """Loaded tensors equal the saved ones bit for bit; metrics are equal up to the order of additions."""
    run = RunDir(tmp_path / "run")
    for done, (stage, ranks, changes) in enumerate(LAYOUTS):
        before = latest_checkpoint(run)
        job = TrainingJob(data.model, run.path, done + 1, stage, keep=9, copy_to=tmp_path / f"{done}", changes=changes)
        assert run_job(job, ranks) == [0] * ranks, read_output(job)
        if before is not None:
            assert_same_content(before / LEARNER_DIR, tmp_path / f"{done}")
            assert read_checkpoint_meta(tmp_path / f"{done}").world_size == ranks
    for line, expected in zip(lines(run.path), lines(uninterrupted_run), strict=False):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4, abs=1e-6)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    reached = read_tensors(run.checkpoints / "step-000006" / LEARNER_DIR)
    for name, tensor in read_tensors(uninterrupted_run / "checkpoints/step-000006" / LEARNER_DIR).items():
        torch.testing.assert_close(reached[name], tensor, atol=2e-6, rtol=1e-4, msg=name)


def create_trainer(data: TrainingData, stage: int, **changes: Any) -> Trainer:
    return Trainer(small_config(data.model, stage, **({"loss": NO_KL, "mini_batch_size": 8} | changes)))


def sft_steps(trainer: Trainer, data: TrainingData, count: int) -> list[float]:
    return [trainer.sft_step(data.trajectories[:2], data.pixels)["loss"] for _ in range(count)]


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
def test_float32_weights_survive_changes_of_dtype_and_offload(
    default_device: torch.device, data: TrainingData, tmp_path: Path, stage: int, changes: dict[str, Any]
) -> None:
    plain = create_trainer(data, 0)
    sft_steps(plain, data, 2)
    plain.save_checkpoint(tmp_path / "plain")
    other = create_trainer(data, stage, **changes)
    sft_steps(other, data, 1)  # overwritten by the load
    other.load_checkpoint(tmp_path / "plain")
    other.save_checkpoint(tmp_path / "other")
    assert_same_content(tmp_path / "plain", tmp_path / "other")
    dtype = next(other.policy.parameters()).dtype
    for name, value in parameters(other).items():
        master = ShardReader(tmp_path / "plain").read(WEIGHTS, name).to(dtype).float().numpy()
        assert np.array_equal(value.ravel(), master), name
    sft_steps(other, data, 2)
    other.save_checkpoint(tmp_path / "later")
    uninterrupted_run = {name: values.copy() for name, values in parameters(other).items()}
    back = create_trainer(data, 0)
    back.load_checkpoint(tmp_path / "later")
    back.save_checkpoint(tmp_path / "back")
    assert_same_content(tmp_path / "later", tmp_path / "back")
    again = create_trainer(data, stage, **changes)
    again.load_checkpoint(tmp_path / "plain")
    sft_steps(again, data, 2)
    assert different_weights(parameters(again), uninterrupted_run, default_device) == []


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_initial_checkpoint_undoes_all_steps(data: TrainingData, tmp_path: Path, stage: int) -> None:
    trainer = create_trainer(data, stage)
    trainer.save_checkpoint(tmp_path / "initial")
    losses = sft_steps(trainer, data, 3)
    trainer.load_checkpoint(tmp_path / "initial")
    assert trainer.engine.steps == 0
    assert sft_steps(trainer, data, 3) == losses


def test_load_checks_the_hash_of_frozen_weights(data: TrainingData, tmp_path: Path) -> None:
    trainer = create_trainer(data, 0, freeze_vision=True)
    sft_steps(trainer, data, 1)
    trainer.save_checkpoint(tmp_path / "frozen")
    assert not any("visual" in name for name in ShardReader(tmp_path / "frozen").shapes)
    with pytest.raises(CheckpointError, match=r"lacks model\.visual\..*, which is trained here"):
        create_trainer(data, 0).load_checkpoint(tmp_path / "frozen")
    moved = shutil.copytree(data.model, tmp_path / "moved")
    Trainer(small_config(moved, 0, loss=NO_KL, freeze_vision=True)).load_checkpoint(tmp_path / "frozen")
    other = small_model(tmp_path / "other")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    elsewhere = Trainer(small_config(other, 0, loss=NO_KL, freeze_vision=True))
    with pytest.raises(CheckpointError, match="other has other weights in the frozen parts"):
        elsewhere.load_checkpoint(tmp_path / "frozen")


def rewrite_file(checkpoint: Path, name: str, text: str) -> None:
    """Change a file and commit the checkpoint again with a valid manifest."""
    (checkpoint / name).write_text(text)
    (checkpoint / MANIFEST).unlink()
    draft = checkpoint.rename(checkpoint.with_name("draft"))
    commit(draft, checkpoint, {"format": FORMAT})


def test_load_refuses_other_models_formats_and_manifests(data: TrainingData, tmp_path: Path) -> None:
    trainer = create_trainer(data, 0)
    sft_steps(trainer, data, 1)
    good = tmp_path / "good"
    trainer.save_checkpoint(good)
    before, index = parameters(trainer), json.loads((good / INDEX).read_text())

    def assert_refused(match: str) -> None:
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
        assert_refused(f"{MANIFEST} of checkpoint .*good does not match its hash")
    (good / MANIFEST).write_text("{")
    assert_refused("does not match its hash")

    name = next(iter(index["shapes"]))
    for shapes, match in (
        ({**index["shapes"], "more.weight": [1]}, r"it holds more\.weight, which is not trained here"),
        ({n: s for n, s in index["shapes"].items() if n != name}, f"it lacks {name}, which is trained"),
        ({**index["shapes"], name: [2, 3]}, rf"{name} has shape \[2, 3\] there and \["),
    ):
        rewrite_file(good, INDEX, json.dumps(index | {"shapes": shapes}))
        assert_refused(match)
    rewrite_file(good, INDEX, json.dumps(index))
    trainer.load_checkpoint(good)
    shutil.move(good, tmp_path / "draft")
    commit(tmp_path / "draft", good, {"world_size": 1})
    assert_refused("has format None; this version reads format 2")


def test_shard_reader_reads_any_range_of_elements(tmp_path: Path) -> None:
    values = torch.arange(24.0)
    shapes = {"a": (2, 3), "b": (18,)}
    pieces = [ParamSlice("a", (2, 3), 0, 6), ParamSlice("b", (18,), 0, 7), ParamSlice("b", (18,), 7, 18)]
    offset = {"a": 0, "b": 6}

    def get(piece: ParamSlice, kind: str) -> torch.Tensor:
        return values[offset[piece.name] :][piece.start : piece.stop] * (1 if kind == WEIGHTS else -1)

    locations = []
    for rank, part in enumerate((pieces[:2], pieces[2:])):
        locations += write_shards(tmp_path, rank, WEIGHTS, part, get, shard_bytes=25)
    assert len({file for *_, file in locations}) == 3
    write_index(tmp_path, shapes, locations)
    shards = ShardReader(tmp_path)
    assert shards.read(WEIGHTS, "a").tolist() == values[:6].tolist()
    assert shards.read(WEIGHTS, "b", 5, 9).tolist() == [11.0, 12.0, 13.0, 14.0]
    assert shards.read(WEIGHTS, "b").tolist() == values[6:].tolist()
    for wrong in (locations[:2], [*locations, locations[1]]):
        with pytest.raises(RuntimeError, match=r"weights of b \[18\] have slices .* overlap or leave a gap"):
            write_index(tmp_path, shapes, wrong)


def test_new_rank_gets_a_reproducible_seed_from_rank_0() -> None:
    state, drawn = get_rng_state(), []
    for rank in (2, 3, 2):
        seed_from_rank0(state, rank)
        drawn.append((random.random(), float(np.random.rand()), torch.rand(1).item()))
    assert drawn[0] == drawn[2]
    assert drawn[0] != drawn[1]
