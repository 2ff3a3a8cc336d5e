"""`vz-ray export`: choice of the checkpoint, and equality with the trainer's own export."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.command_line import run_command
from tests.learner.rank_worker import small_config, small_training_data
from tests.learner.training_data import TrainingData, small_model
from vz_ray.config.loss import LossConfig
from vz_ray.learner.checkpoint_files import MANIFEST, CheckpointError
from vz_ray.learner.export import export_checkpoint
from vz_ray.learner.trainer import Trainer
from vz_ray.training.export import resolve_checkpoint, run_export
from vz_ray.utils.errors import UserError
from vz_ray.utils.step_dirs import write_step_metric


@pytest.fixture(scope="module")
def training_data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return small_training_data(small_model(tmp_path_factory.mktemp("model")))


def trained_trainer(training_data: TrainingData, stage: int, **changes: object) -> Trainer:
    trainer = Trainer(small_config(training_data.model, stage, loss=LossConfig(kl_coef=0.0), **changes))
    trainer.sft_step(training_data.trajectories[:2], training_data.pixels)
    return trainer


@pytest.mark.parametrize(("stage", "changes"), [(0, {}), (2, {"dtype": "bfloat16"}), (3, {"freeze_vision": True})])
def test_export_equals_trainer_export_byte_for_byte(
    training_data: TrainingData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: int,
    changes: dict[str, object],
) -> None:
    """The export works without DeepSpeed."""
    trainer = trained_trainer(training_data, stage, **changes)
    trainer.save_checkpoint(tmp_path / "step")
    trainer.export_hf(tmp_path / "trainer")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    run_export(tmp_path / "step", tmp_path / "disk")
    files = {path.name for path in (tmp_path / "trainer").iterdir()}
    assert {path.name for path in (tmp_path / "disk").iterdir()} == files
    assert "tokenizer.json" in files
    for name in files - {MANIFEST}:
        assert (tmp_path / "disk" / name).read_bytes() == (tmp_path / "trainer" / name).read_bytes(), name


def test_exported_model_has_equal_logprobs(training_data: TrainingData, tmp_path: Path) -> None:
    trainer = trained_trainer(training_data, 0)
    trainer.save_checkpoint(tmp_path / "step")
    export_checkpoint(tmp_path / "step", tmp_path / "out")
    exported = Trainer(small_config(tmp_path / "out", 0, loss=LossConfig(kl_coef=0.0)))
    logprobs = [t.compute_logprobs(training_data.trajectories, training_data.pixels) for t in (trainer, exported)]
    assert all(np.array_equal(first, second) for first, second in zip(*logprobs, strict=True))


def test_other_base_model_is_rejected(training_data: TrainingData, tmp_path: Path) -> None:
    trained_trainer(training_data, 0, freeze_vision=True).save_checkpoint(tmp_path / "step")
    moved = shutil.copytree(training_data.model, tmp_path / "moved")
    run_export(tmp_path / "step", tmp_path / "out", moved)
    weights = moved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match=r"trained on other weights than those of .*moved"):
        run_export(tmp_path / "step", tmp_path / "other", moved)
    assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match=r"gone.* is not a directory"):
        run_export(tmp_path / "step", tmp_path / "other", tmp_path / "gone")


def make_checkpoint(step: Path, metric: float | None = None) -> Path:
    (step / "learner").mkdir(parents=True)
    if metric is not None:
        write_step_metric(step, "reward/total", metric)
    return step / "learner"


def test_run_resolves_to_newest_or_best_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    sft_checkpoint = make_checkpoint(run / "checkpoints/policy/step-000030")
    assert resolve_checkpoint(run) == resolve_checkpoint(run / "checkpoints/policy") == sft_checkpoint
    make_checkpoint(run / "checkpoints/cold_start/step-000009")
    with pytest.raises(UserError, match=r"several stages; choose one: .*cold_start, .*policy"):
        resolve_checkpoint(run)
    make_checkpoint(run / "checkpoints/step-000001")
    with pytest.raises(UserError, match=r"has a metric: train with train\.keep_best"):
        resolve_checkpoint(run, best=True)
    best = make_checkpoint(run / "checkpoints/step-000002", 0.7)
    newest = make_checkpoint(run / "checkpoints/step-000004", 0.3)
    assert resolve_checkpoint(run) == newest
    assert resolve_checkpoint(run, best=True) == best
    assert resolve_checkpoint(best.parent) == best
    (best / MANIFEST).write_text("{}")
    assert resolve_checkpoint(best) == best


def test_missing_checkpoint_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint(tmp_path / "old/checkpoints/step-000001")
    for source, out, message in (
        ("nowhere", "out", "has no complete checkpoint"),
        ("old", "out", "has no manifest.json: no complete checkpoint was written there"),
        ("old", "old", "exists and is not overwritten"),
    ):
        assert run_command(monkeypatch, "export", str(tmp_path / source), str(tmp_path / out)) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
