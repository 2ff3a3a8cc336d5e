"""Real trackers, skipped if not installed: MLflow with a file store, Weights & Biases offline."""

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
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir.create_or_resume(tmp_path / "agent", "seed: 3\nlearner:\n  world_size: 2\n")[0]


def log_rows(run_dir: RunDir, configured: dict[str, str], steps: range) -> None:
    opened_trackers = open_trackers(configured, run_dir, flatten_config(run_dir.config))
    with MetricLogger(run_dir.metrics, resume_step=steps.start - 1, trackers=opened_trackers) as log:
        for step in steps:
            log.log(step, {"reward/total": step / 10, "learner/loss": math.nan})
    for tracker in opened_trackers:
        tracker.close()
        assert tracker.dropped == 0


def test_mlflow_run_is_resumed(run_dir, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    uri = (run_dir.path / "mlruns").as_uri()
    log_rows(run_dir, {"mlflow_tracking_uri": uri}, range(3))
    log_rows(run_dir, {"mlflow_tracking_uri": uri}, range(2, 5))
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("vz_ray")
    (tracker_run,) = client.search_runs([experiment.experiment_id])
    assert tracker_run.info.run_id == json.loads((run_dir.path / "trackers.json").read_text())["mlflow"]
    assert (tracker_run.info.run_name, tracker_run.info.status) == ("agent", "FINISHED")
    assert tracker_run.data.params == {"seed": "3", "learner.world_size": "2"}
    history = client.get_metric_history(tracker_run.info.run_id, "reward/total")
    assert [(m.step, m.value) for m in history] == [
        (0, 0.0),
        (1, 0.1),
        (2, 0.2),
        (2, 0.2),
        (3, 0.3),
        (4, 0.4),
    ]
    assert "learner/loss" not in tracker_run.data.metrics
    assert len(read_metrics(run_dir.metrics)) == 5


def test_wandb_run_is_resumed(run_dir, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_rows(run_dir, {"wandb_project": "zooming"}, range(3))
    id = json.loads((run_dir.path / "trackers.json").read_text())["wandb"]
    log_rows(run_dir, {"wandb_project": "zooming"}, range(3, 5))
    assert json.loads((run_dir.path / "trackers.json").read_text())["wandb"] == id
    files = list((run_dir.logs / "wandb").glob(f"offline-run-*-{id}/run-{id}.wandb"))
    assert files
    assert any(b"reward/total" in file.read_bytes() for file in files)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"monitoring\.wandb_project is 'p', but wandb is not installed; pip install wandb"
    ):
        check_trackers_installed({"wandb_project": "p", "mlflow_tracking_uri": ""})
    with pytest.raises(UserError, match=r"mlflow is not installed; pip install mlflow, or"):
        check_trackers_installed({"wandb_project": "", "mlflow_tracking_uri": "file:x"})
    check_trackers_installed({"wandb_project": "", "mlflow_tracking_uri": ""})


def test_unresponsive_server_fails_at_the_start(run_dir, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setattr(trackers, "START_TIMEOUT_S", 1.0)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"monitoring\.mlflow_tracking_uri is '{uri}', .* no answer within 1 s"):
            open_trackers({"mlflow_tracking_uri": uri}, run_dir, {})


def test_hung_tracker_does_not_block():
    stuck = threading.Event()

    class Hanging:
        def log(self, row):
            stuck.wait(30)

        def finish(self):
            pass

    tracker = Tracker("x", Hanging())
    start = time.monotonic()
    for step in range(3 * trackers.MAX_PENDING_ROWS):
        tracker.log(step, {"a": 1.0})
    assert time.monotonic() - start < 5
    assert tracker.dropped >= 2 * trackers.MAX_PENDING_ROWS - 1
    stuck.set()
