"""The command of a finished run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small_run import SmallRun
from vz_ray.config import load_config
from vz_ray.config.load import to_yaml
from vz_ray.config.run import GrpoRunConfig
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.training.run import run_training


def test_finished_run_starts_no_actor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(*_: object) -> None:
        raise AssertionError("an actor was started")

    monkeypatch.setattr("vz_ray.training.run.checked_ray_cluster", start)
    config = load_config(GrpoRunConfig, "conf/laptop.yaml", [*SmallRun.create(tmp_path).overrides(), "name=done"])
    run, _ = RunDir.create_or_resume(Path(config.runs) / "done", to_yaml(config))
    with pytest.raises(AssertionError, match="an actor was started"):
        run_training(config)
    model = run.path / "models" / "policy"
    model.mkdir(parents=True)
    run_training(config)
    assert f"the run is finished: {model}; to train further, start a run with model={model}" in capsys.readouterr().out
