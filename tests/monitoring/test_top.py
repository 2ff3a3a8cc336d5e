"""`vz-ray top` on run directories in every state."""

from __future__ import annotations

import json
import logging
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from tests.command_line import run_command
from vz_ray.monitoring.live_status import LiveStatus, RunState
from vz_ray.monitoring.log_context import JsonFormatter
from vz_ray.monitoring.metric_logger import MetricLogger
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.monitoring.run_view import read_run_view, recent_warnings
from vz_ray.monitoring.top import render_view, sparkline
from vz_ray.utils.errors import UserError


def make_run(path: Path, **changes) -> RunDir:
    run, _ = RunDir.create_or_resume(path, "seed: 0\n")
    now = time.time()
    status = LiveStatus(
        run=path.name, host="node-1", pid=77, heartbeat_interval_s=5.0, phase="learn", phase_started_s=now - 75,
        step=3, max_steps=10, last_step_s=now - 75, eta_s=4000.0,
        checkpoint={"at_s": now - 120, "seconds": 2.5, "step": 2.0},
        rollout={
            "workers": {"ready": 2, "dead": 1}, "running": 9, "queued": 5, "lost": 1,
            "tokens_per_second": 812.4, "episodes_per_second": 1.25,
            "worker_statuses": [
                {"name": "rollout-0", "state": "ready", "load": 5, "reason": ""},
                {"name": "rollout-2", "state": "draining", "load": 4, "reason": "node preempted"},
            ],
        },
        decode={
            "decoders": 4, "unresponsive": 1, "hit_ratio": 0.75, "in_flight": 6, "waiting": 2,
            "wait_p50_s": 0.012, "wait_p95_s": 0.3, "failures": 2, "quarantined": 1,
        },
    )  # fmt: skip
    for name, value in changes.items():
        setattr(status, name, value)
    status.write(run.live_status)
    with MetricLogger(run.metrics) as log:
        for step in range(4):
            log.log(step, {"reward/total": step / 10, "reward/accuracy": 0.5, "mismatch/kl": 1e-6})
    return run


def age_status(run: RunDir, seconds: float) -> None:
    status = json.loads(run.live_status.read_text())
    run.live_status.write_text(json.dumps(status | {"written_s": time.time() - seconds}))


def render(run: RunDir) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_view(read_run_view(run.path)))
    return console.export_text()


def test_screen_of_a_running_run(tmp_path):
    text = render(make_run(tmp_path / "agent"))
    for words in (
        "running", "step 3 of 10", "learn for 1 min 15 s", "left 1 h 06 min", "checkpoint 2 2 min 00 s ago, took 2.5 s",
        "2 ready", "1 dead", "9 running", "5 queued", "812 tokens/s", "rollout-2", "node preempted",
        "4 decoders, 1 unresponsive", "cache hits 75%", "2 waiting", "0.300s p95", "1 quarantined", "no warnings",
    ):  # fmt: skip
        assert words in text, words
    assert "▁▃▅█" in text
    assert "0.3" in text


def test_sft_run_shows_steps_and_loss(tmp_path):
    run = make_run(tmp_path / "sft", run_kind="sft", metrics_file="policy.jsonl", rollout={})
    with MetricLogger(run.path / "policy.jsonl") as log:
        for step in range(1, 5):
            log.log(step, {"loss": 3.0 - step / 2, "grad_norm": 1.5, "tokens_per_second": 900.0})
    text = render(run)
    for words in (
        "step 3 of 10",
        "learn for 1 min 15 s",
        "left 1 h 06 min",
        "checkpoint 2 2 min 00 s ago",
        "4 decoders",
    ):
        assert words in text, words
    assert re.search(r"loss +█▅▃▁ +1\n", re.sub(r" +\n", "\n", text))
    assert "rollout" not in text
    assert read_run_view(run.path).curves == {
        "loss": [2.5, 2.0, 1.5, 1.0],
        "grad norm": [1.5] * 4,
        "tokens/s": [900.0] * 4,
    }


def test_distillation_shows_episodes_and_cost(tmp_path):
    run = make_run(tmp_path / "exemplar", run_kind="distill", rollout={}, checkpoint={}, state="stopped")
    with MetricLogger(run.metrics) as log:
        log.log(4, {"teacher/correct_rate": 0.75, "teacher/failed_rate": 0.25, "teacher/cost_usd": 1.5})
    text = render(run)
    assert "episode 3 of 10" in text
    assert "the same command resumes with the next episode" in text
    assert read_run_view(run.path).curves == {"correct": [0.75], "failed": [0.25], "cost $": [1.5]}


@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        ("ended", "", "The run ended"),
        ("stopped", "", "the same command resumes from the last checkpoint"),
        ("failed", "UserError: no disk", "s ago: UserError: no disk"),
    ],
)
def test_finished_run_shows_its_outcome(tmp_path, state, error, words):
    text = render(make_run(tmp_path / "agent", state=state, error=error))
    assert words in text
    assert "left" not in text


def test_run_without_heartbeat_is_stale(tmp_path):
    run = make_run(tmp_path / "agent")
    age_status(run, 400)
    assert read_run_view(run.path).state is RunState.STALE
    text = render(run)
    assert "No heartbeat for 6 min 40 s, expected every 5 s" in text
    assert "process 77 on node-1" in " ".join(text.replace("│", " ").split())


def test_run_without_status_is_not_started(tmp_path):
    run, _ = RunDir.create_or_resume(tmp_path / "agent", "seed: 0\n")
    view = read_run_view(run.path)
    assert (view.state, view.status) == (None, None)
    assert "not started" in render(run)


def test_missing_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no run at .*nowhere: directory not found"):
        read_run_view(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config.yaml is missing"):
        read_run_view(tmp_path)


def test_recent_warnings_reads_text_and_json(tmp_path):
    log = tmp_path / "vz_ray.log"
    text = "2026-01-05 10:00:00,123 WARNING MainProcess vz_ray.rollout.worker_pool: rollout-0 is out: x\nTraceback\n"
    record = logging.LogRecord("vz_ray.decode", logging.ERROR, "", 1, "a.mp4 is quarantined\nmore", (), None)
    info = logging.LogRecord("vz_ray.decode", logging.INFO, "", 1, "fine", (), None)
    lines = [JsonFormatter("agent").format(r) for r in (record, info)]
    log.write_text(text + "\n".join(lines) + '\n{"broken\n')
    warnings = recent_warnings(log)
    assert [(level, logger, message) for _, level, logger, message in warnings] == [
        ("WARNING", "vz_ray.rollout.worker_pool", "rollout-0 is out: x"),
        ("ERROR", "vz_ray.decode", "a.mp4 is quarantined"),
    ]
    log.write_text(text * 50)
    assert len(recent_warnings(log)) == 5
    assert recent_warnings(tmp_path / "none.log") == []


def test_sparkline_marks_non_finite_values():
    assert sparkline([0, 1, 2, 3]) == "▁▃▅█"
    assert sparkline([5, 5]) == "▁▁"
    assert sparkline([0, float("nan"), 1]) == "▁×█"
    assert sparkline([]) == ""
    assert len(sparkline(list(range(100)), width=10)) == 10


def test_command_prints_one_screen_without_a_terminal(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "agent")
    for options in ([], ["--once"]):
        assert run_command(monkeypatch, "top", str(run.path), *options) == 0
        output = capsys.readouterr()
        assert "step 3 of 10" in output.out
        assert "\x1b" not in output.out
        assert output.err == ""


def test_command_prints_json(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "agent")
    assert run_command(monkeypatch, "top", str(run.path), "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["state"] == "running"
    assert values["age_s"] < 60
    assert values["status"]["rollout"]["queued"] == 5
    assert values["curves"]["reward"] == [0.0, 0.1, 0.2, 0.3]


def test_command_reports_a_missing_run(tmp_path, monkeypatch, capsys):
    assert run_command(monkeypatch, "top", str(tmp_path / "nowhere")) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("vz-ray: no run at ")
    assert output.err.count("\n") == 1
