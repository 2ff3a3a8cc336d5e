"""`vz-ray export`: which checkpoint is meant, and that it becomes what the trainer itself would export."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.learner.rank_worker import small_config, small_training_data
from tests.learner.training_data import TrainingData, small_model
from vz_ray import cli
from vz_ray.config.learner import LossConfig
from vz_ray.learner.checkpoint_files import MANIFEST, CheckpointError
from vz_ray.learner.export import export_checkpoint
from vz_ray.learner.trainer import Trainer
from vz_ray.training.export import resolve_checkpoint, run_export
from vz_ray.utils.errors import UserError
from vz_ray.utils.step_dirs import write_step_metric


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return small_training_data(small_model(tmp_path_factory.mktemp("model")))


def trained(world: TrainingData, stage: int, **changes: object) -> Trainer:
    trainer = Trainer(small_config(world.model, stage, loss=LossConfig(kl_coef=0.0), **changes))
    trainer.sft_step(world.trajectories[:2], world.pixels)
    return trainer


@pytest.mark.parametrize(
    ("stage", "changes"), [(0, {}), (2, {"dtype": "bfloat16"}), (3, {"freeze_vision": True})]
)
def test_a_checkpoint_becomes_what_the_trainer_exports_byte_for_byte(
    world: TrainingData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: int,
    changes: dict[str, object],
) -> None:
    """And without DeepSpeed, which a machine that only exports need not have."""
    trainer = trained(world, stage, **changes)
    trainer.save_checkpoint(tmp_path / "step")
    trainer.export_hf(tmp_path / "trainer")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    run_export(tmp_path / "step", tmp_path / "disk")
    files = {path.name for path in (tmp_path / "trainer").iterdir()}
    assert {path.name for path in (tmp_path / "disk").iterdir()} == files
    assert "tokenizer.json" in files
    for name in files - {MANIFEST}:
        assert (tmp_path / "disk" / name).read_bytes() == (tmp_path / "trainer" / name).read_bytes(), name


def test_transformers_computes_the_same_with_an_export(world: TrainingData, tmp_path: Path) -> None:
    trainer = trained(world, 0)
    trainer.save_checkpoint(tmp_path / "step")
    export_checkpoint(tmp_path / "step", tmp_path / "out")
    again = Trainer(small_config(tmp_path / "out", 0, loss=LossConfig(kl_coef=0.0)))
    rows = [t.compute_logprobs(world.trajectories, world.pixels) for t in (trainer, again)]
    assert all(np.array_equal(one, two) for one, two in zip(*rows, strict=True))


def test_a_base_that_is_another_model_is_refused(world: TrainingData, tmp_path: Path) -> None:
    trained(world, 0, freeze_vision=True).save_checkpoint(tmp_path / "step")
    moved = shutil.copytree(world.model, tmp_path / "moved")
    run_export(tmp_path / "step", tmp_path / "out", moved)
    weights = moved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match=r"trained on other weights than those of .*moved"):
        run_export(tmp_path / "step", tmp_path / "other", moved)
    assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match=r"gone.* is not a directory"):
        run_export(tmp_path / "step", tmp_path / "other", tmp_path / "gone")


def learner(step: Path, figure: float | None = None) -> Path:
    (step / "learner").mkdir(parents=True)
    if figure is not None:
        write_step_metric(step, "reward/total", figure)
    return step / "learner"


def test_a_run_stands_for_its_newest_checkpoint_or_its_best(tmp_path: Path) -> None:
    run = tmp_path / "run"
    supervised = learner(run / "checkpoints/policy/step-000030")
    assert resolve_checkpoint(run) == resolve_checkpoint(run / "checkpoints/policy") == supervised
    learner(run / "checkpoints/cold_start/step-000009")
    with pytest.raises(UserError, match=r"several stages, give one: .*cold_start, .*policy"):
        resolve_checkpoint(run)
    learner(run / "checkpoints/step-000001")
    with pytest.raises(UserError, match=r"figure to be compared by: set train\.keep_best"):
        resolve_checkpoint(run, best=True)
    best = learner(run / "checkpoints/step-000002", 0.7)
    newest = learner(run / "checkpoints/step-000004", 0.3)
    assert resolve_checkpoint(run) == newest
    assert resolve_checkpoint(run, best=True) == best
    assert resolve_checkpoint(best.parent) == best
    (best / MANIFEST).write_text("{}")
    assert resolve_checkpoint(best) == best


def test_what_leads_to_no_checkpoint_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("VZ_RAY_DEBUG", raising=False)
    learner(tmp_path / "old/checkpoints/step-000001")
    for source, out, message in (
        ("nowhere", "out", "no complete checkpoint at"),
        ("old", "out", "has no manifest.json: no complete checkpoint was written there"),
        ("old", "old", "exists, and is never written over"),
    ):
        monkeypatch.setattr(sys, "argv", ["vz-ray", "export", str(tmp_path / source), str(tmp_path / out)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
