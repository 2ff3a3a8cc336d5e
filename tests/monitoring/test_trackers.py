"""Trackers for real, skipped where they are not installed: MLflow with files, Weights & Biases offline."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from pathlib import Path

import pytest

from vz_ray.monitoring import trackers
from vz_ray.monitoring.metric_logger import MetricLogger, read_metrics
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.monitoring.trackers import Tracker, check_trackers_installed, flatten_config, open_trackers
from vz_ray.utils.errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create_or_resume(tmp_path / "agent", "seed: 3\nlearner:\n  ranks: 2\n")[0]


def log_rows(run: RunDir, wanted: dict[str, str], steps: range) -> None:
    opened = open_trackers(wanted, run, flatten_config(run.config))
    with MetricLogger(run.metrics, resume_step=steps.start - 1, trackers=opened) as log:
        for step in steps:
            log.log(step, {"reward/total": step / 10, "learner/loss": math.nan})
    for tracker in opened:
        tracker.close()
        assert tracker.dropped == 0


def test_a_run_of_mlflow_is_gone_on_with(run, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    uri = (run.path / "mlruns").as_uri()
    log_rows(run, {"mlflow_uri": uri}, range(3))
    log_rows(run, {"mlflow_uri": uri}, range(2, 5))
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("vz_ray")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == json.loads((run.path / "trackers.json").read_text())["mlflow"]
    assert (found.info.run_name, found.info.status) == ("agent", "FINISHED")
    assert found.data.params == {"seed": "3", "learner.world_size": "2"}
    history = client.get_metric_history(found.info.run_id, "reward/total")
    assert [(m.step, m.value) for m in history] == [
        (0, 0.0),
        (1, 0.1),
        (2, 0.2),
        (2, 0.2),
        (3, 0.3),
        (4, 0.4),
    ]
    assert "learner/loss" not in found.data.metrics
    assert len(read_metrics(run.metrics)) == 5


def test_a_run_of_weights_and_biases_is_gone_on_with(run, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_rows(run, {"wandb_project": "zooming"}, range(3))
    id = json.loads((run.path / "trackers.json").read_text())["wandb"]
    log_rows(run, {"wandb_project": "zooming"}, range(3, 5))
    assert json.loads((run.path / "trackers.json").read_text())["wandb"] == id
    files = list((run.logs / "wandb").glob(f"offline-run-*-{id}/run-{id}.wandb"))
    assert files
    assert any(b"reward/total" in file.read_bytes() for file in files)


def test_a_package_that_is_missing_is_named_before_anything_starts(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"observe\.wandb_project is 'p' and wandb is not installed: pip install wandb"
    ):
        check_trackers_installed({"wandb_project": "p", "mlflow_uri": ""})
    with pytest.raises(UserError, match=r"mlflow is not installed: pip install mlflow, or"):
        check_trackers_installed({"wandb_project": "", "mlflow_uri": "file:x"})
    check_trackers_installed({"wandb_project": "", "mlflow_uri": ""})


def test_a_server_that_does_not_answer_is_an_error_at_the_start(run, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setattr(trackers, "START_TIMEOUT_S", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"observe\.mlflow_uri is '{uri}' .* no answer within 1 s"):
            open_trackers({"mlflow_uri": uri}, run, {})


def test_a_tracker_that_hangs_delays_nothing():
    stuck = threading.Event()

    class Hanging:
        def log(self, row):
            stuck.wait(30)

        def end(self):
            pass

    tracker = Tracker("x", Hanging())
    began = time.monotonic()
    for step in range(3 * trackers.MAX_PENDING_ROWS):
        tracker.log(step, {"a": 1.0})
    assert time.monotonic() - began < 5
    assert tracker.dropped >= 2 * trackers.MAX_PENDING_ROWS - 1
    stuck.set()
