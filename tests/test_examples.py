"""The examples run on a run directory, and the notebook's cells execute in order."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.distill.oracle_server import OracleServer
from tests.needle.tiny_setup import make_train_tasks
from tests.rewards.fake_endpoint import serve_endpoint
from vz_ray.api import load_config
from vz_ray.data.chat_format_loader import load_chat_format
from vz_ray.data.episode_record import EpisodeRecord, append_records
from vz_ray.env.task import Task
from vz_ray.env.trajectory import RewardParts
from vz_ray.monitoring.metric_logger import MetricLogger
from vz_ray.needle.exemplars import collect_exemplars, zoom_oracle_factory
from vz_ray.video.local_source import LocalFrameSource

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "assets/tiny-base"


EPISODE = load_config("conf/quickstart.yaml", command="quickstart").episode


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Task]:
    return make_train_tasks(tmp_path_factory.mktemp("needle"), 1, [4])


@pytest.fixture(scope="module")
def run(tasks: list[Task], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of two steps with episodes that an oracle played."""
    folder = tmp_path_factory.mktemp("run")
    chat_format = load_chat_format(MODEL, EPISODE)
    with LocalFrameSource() as frames:
        trajectories = asyncio.run(
            collect_exemplars(tasks, frames, chat_format, EPISODE, zoom_oracle_factory(chat_format))
        )
    (folder / "episodes").mkdir()
    with MetricLogger(folder / "metrics.jsonl") as log:
        for step in range(2):
            records = [
                EpisodeRecord(task, replace(t, reward=RewardParts(1.0, 1.0, 1.0, 0.5)), "rl", step, 0.0)
                for task, t in zip(tasks, trajectories, strict=True)
            ]
            append_records(folder / f"episodes/{step:06d}.jsonl", records)
            log.log(step, {"reward/total": 1.0, "reward/accuracy": 1.0, "zoom/valid_rate": 1.0})
    return folder


def start_example(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
    )


def run_example(*arguments: str) -> str:
    done = start_example(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_inspect_run_prints_metrics_and_accuracy(run: Path):
    output = run_example("examples/inspect_run.py", str(run))
    assert "step 1: reward 1.000, accuracy 1.000" in output
    assert "training episodes" in output
    assert "neither a run directory with checkpoints nor a checkpoint" in output


@pytest.mark.slow
def test_ask_video_prints_answer_of_checkpoint(tasks: list[Task]):
    arguments = [tasks[0].video, tasks[0].question, "--model", str(MODEL)]
    assert "frames)" in run_example("examples/ask_video.py", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ask_video.py", "gone.mp4", "What?", "--model", str(MODEL)), "ask_video: file gone.mp4 does not exist\n"),
        (("inspect_run.py", "gone"), "inspect_run: gone/metrics.jsonl does not exist"),
    ],
)
def test_missing_input_is_one_line(arguments: tuple[str, ...], message: str):
    script, *rest = arguments
    done = start_example(f"examples/{script}", *rest)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_ask_endpoint_prints_turns_and_answer(tasks: list[Task]):
    with serve_endpoint(OracleServer(tasks, load_chat_format(MODEL, EPISODE))) as endpoint:
        options = ["--model", "oracle", "--base-url", endpoint.url, "--tokenizer", str(MODEL)]
        output = run_example(
            "examples/ask_endpoint.py",
            tasks[0].video,
            tasks[0].question,
            *options,
            "--config",
            "conf/laptop.yaml",
        )
    assert f"answer: {tasks[0].answer} (answered)" in output


def test_notebook_cells_run_in_order(run: Path, monkeypatch: pytest.MonkeyPatch):
    matplotlib = pytest.importorskip("matplotlib")
    pytest.importorskip("pandas")
    matplotlib.use("Agg")
    monkeypatch.setenv("VZ_RAY_RUN", str(run))
    notebook = json.loads((ROOT / "examples/quickstart_results.ipynb").read_text())
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert len(names["episodes"]) == 2 * len({row["task"] for row in names["vz_ray"].episode_rows(run)})
