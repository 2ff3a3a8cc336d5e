"""SIGTERM during a long learner step of a real run."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.small_run import SmallRun, run_vz_ray, send_signal, start_vz_ray, wait_for_exit, wait_until
from vz_ray.monitoring.metric_logger import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MANY_EPOCHS = 60
"""Passes over the episodes of a step, so that a learner step takes long."""


def phase(run: Path) -> str:
    path = run / "live.json"
    return str(json.loads(path.read_text()).get("phase")) if path.exists() else ""


def test_stop_drops_the_learner_step_and_resumes_before_it(tmp_path: Path) -> None:
    small = SmallRun.create(tmp_path)
    run = small.runs / "stopped"
    arguments = ["train", "conf/laptop.yaml", "name=stopped", *small.overrides()]
    arguments += ["train.max_steps=2", "train.checkpoint_every=100", f"learner.epochs={MANY_EPOCHS}"]
    process = start_vz_ray(*arguments)
    wait_until(lambda: len(read_metrics(run / "metrics.jsonl")) == 1 and phase(run) == "learn", process, 500)
    send_signal(process, signal.SIGTERM)
    stopped = wait_for_exit(process, 120)
    assert stopped.returncode == 130, stopped.stderr
    assert "vz-ray: stopped by SIGTERM; saved the run after 1 step; the same command resumes" in stopped.stderr
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000001"]
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [0]

    done = run_vz_ray(*arguments, timeout_s=500)
    assert done.returncode == 0, done.stderr
    rows = read_metrics(run / "metrics.jsonl")
    assert [(row["step"], row["learner/updates"]) for row in rows] == [(0, MANY_EPOCHS), (1, MANY_EPOCHS)]
