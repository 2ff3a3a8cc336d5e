"""`vz-ray distill` against a real HTTP server: resume after SIGKILL, budget, stop."""

from __future__ import annotations

import asyncio
import json
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.command_line import run_command
from tests.distill.oracle_server import (
    WRONG_ZOOM_TURN,
    ContinuationOracleServer,
    OracleServer,
    count_turns,
    make_completion,
)
from tests.distill.teacher_episodes import run_teacher_jobs
from tests.needle.tiny_setup import EPISODE_CONFIG
from tests.rewards.fake_endpoint import FakeReply, serve_endpoint
from tests.small_run import (
    ROOT,
    descendants,
    run_vz_ray,
    send_signal,
    start_vz_ray,
    survivors,
    wait_for_exit,
    wait_until,
)
from vz_ray.config.data import SynthConfig
from vz_ray.data.chat_format_loader import load_chat_format
from vz_ray.data.sft_file import SftFile
from vz_ray.data.task_file import read_tasks
from vz_ray.distill.teacher_runner import TeacherJob
from vz_ray.env.chat_format import ChatFormat
from vz_ray.env.task import Task
from vz_ray.env.trajectory import Trajectory
from vz_ray.monitoring.live_status import LiveStatus, RunState
from vz_ray.monitoring.run_view import read_run_view
from vz_ray.needle.synthesis import synthesize
from vz_ray.utils.json_lines import read_complete_lines
from vz_ray.video.frame import FrameSize
from vz_ray.video.local_source import LocalFrameSource

pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class DistillSetup:
    """Two videos, and the chat format of the shipped tiny model."""

    folder: Path
    tasks: list[Task]
    chat_format: ChatFormat

    def exemplar(self, url: str, name: str, *more: str) -> list[str]:
        tasks = f"tasks={self.folder / 'needle' / 'train.json'}"
        return ["distill", "exemplar", *self.arguments(url, name), tasks, "attempts_per_task=2", *more]

    def arguments(self, url: str, name: str) -> list[str]:
        return [
            "conf/distill/needle.yaml",
            f"runs={self.folder / 'runs'}",
            f"name={name}",
            "teacher.model=oracle",
            f"teacher.base_url={url}",
            "teacher.input_usd_per_mtok=10",
            "teacher.output_usd_per_mtok=100",
            "teacher.backoff_s=0.1",
        ]

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> DistillSetup:
    folder = tmp_path_factory.mktemp("distill")
    config = SynthConfig(directory=str(folder / "needle"), train=2, sft=0, validation=0, test=0, shot_s=[4], workers=1)
    path = synthesize(config)["train"]
    records = json.loads(path.read_text())
    for record in records:
        # The oracle server selects the oracle by the task id in the question.
        record["problem"] = f"<image>({record['problem_id']}) " + record["problem"].removeprefix("<image>")
    path.write_text(json.dumps(records))
    chat_format = load_chat_format(ROOT / "assets/tiny-base", EPISODE_CONFIG)
    return DistillSetup(folder, read_tasks(path), chat_format)


def load_sft(path: Path, setup: DistillSetup) -> list[Trajectory]:
    """Load an SFT file like `vz-ray sft`."""
    with LocalFrameSource() as frames:
        loading = SftFile.load(path).load_trajectories(setup.chat_format, FrameSize(784, 784, 28), frames)
        return asyncio.run(loading)


class SlowOracleServer(OracleServer):
    """Oracle server with a delay, so that the client can be stopped during a request."""

    def __call__(self, number, body):
        return replace(super().__call__(number, body), delay_s=0.3)


def lines_with(kind: str, run: Path) -> int:
    path = run / "replies.jsonl"
    return sum(kind in line for line in read_complete_lines(path)) if path.exists() else 0


def test_killed_run_resumes_without_paying_twice(setup):
    run = setup.run("killed")
    with serve_endpoint(SlowOracleServer(setup.tasks, setup.chat_format)) as endpoint:
        arguments = setup.exemplar(endpoint.url, "killed", "teacher.max_concurrency=2")
        process = start_vz_ray(*arguments)
        wait_until(lambda: lines_with("replied", run) >= 9, process)
        children = descendants(process)
        send_signal(process, signal.SIGKILL)
        process.wait()
        for child in children:
            child.kill()
        paid, before = lines_with("replied", run), len(endpoint.requests)
        lost = lines_with("reserved", run) - paid
        done = run_vz_ray(*arguments)
        assert done.returncode == 0, done.stderr
        new_requests = len(endpoint.requests) - before
    lines = list(read_complete_lines(run / "episodes" / "exemplar.jsonl"))
    turns = sum(len(line["trajectory"]["turns"]) for line in lines[1:])
    assert len(lines) - 1 == 2 * len(setup.tasks)
    # Only requests without a recorded reply are sent again.
    assert new_requests == turns - paid
    assert before - paid <= lost <= 2
    card = json.loads((run / "dataset" / "card.json").read_text())
    assert card["cost"]["cost_usd"] == pytest.approx(0.015 * turns)
    assert card["cost"]["requests"] == turns + lost
    assert card["num_episodes"] == 2 * len(setup.tasks) == card["kept"] + sum(card["dropped"].values())
    assert card["kept"] == len(setup.tasks)
    assert len(load_sft(run / "dataset" / "sft.json", setup)) == card["kept"]
    assert "resuming" in done.stdout
    assert "Kept, by pattern" in done.stdout


def test_budget_ends_run_with_resume_hint(setup):
    with serve_endpoint(OracleServer(setup.tasks, setup.chat_format)) as endpoint:
        limited = run_vz_ray(*setup.exemplar(endpoint.url, "limited", "teacher.max_cost_usd=0.2"))
        assert limited.returncode == 2
        assert f"data set: {setup.run('limited') / 'dataset'}" in limited.stdout
        live = LiveStatus.read(setup.run("limited") / "live.json")
        assert live is not None
        assert (live.state, live.run_kind, live.max_steps) == ("failed", "distill", 2 * len(setup.tasks))
        assert "teacher.max_cost_usd is 0.2" in live.error
        assert "Raise it and run the same command to resume." in limited.stderr
        card = json.loads((setup.run("limited") / "dataset" / "card.json").read_text())
        assert 0 < card["cost"]["cost_usd"] <= 0.2
        assert card["num_episodes"] < card["planned"] == 2 * len(setup.tasks)


def test_stop_records_pending_replies_and_exits(setup):
    run = setup.run("stopped")
    with serve_endpoint(SlowOracleServer(setup.tasks, setup.chat_format)) as endpoint:
        process = start_vz_ray(*setup.exemplar(endpoint.url, "stopped"))
        wait_until(lambda: lines_with("replied", run) >= 3, process)
        children = descendants(process)
        send_signal(process, signal.SIGTERM)
        result = wait_for_exit(process)
        assert result.returncode == 130, result.stderr
        assert "run the same command to resume; paid replies are reused" in result.stderr
        assert not survivors(children)
    view = read_run_view(run)
    assert (view.state, view.status.run_kind) == (RunState.STOPPED, "distill")
    assert lines_with("reserved", run) == lines_with("replied", run)


def test_distillation_is_monitored(setup):
    """Check `live.json`, TensorBoard rows, and log lines with run and episode."""

    def busy(number, body):
        """Reject one request in three. The retries are logged."""
        return FakeReply(status=503) if number % 3 == 1 else None

    run = setup.run("watched")
    with serve_endpoint(OracleServer(setup.tasks, setup.chat_format, busy)) as endpoint:
        done = run_vz_ray(
            *setup.exemplar(endpoint.url, "watched", "monitoring.log_format=json", "monitoring.poll_interval_s=1")
        )
    assert done.returncode == 0, done.stderr
    view = read_run_view(run)
    assert view.status is not None
    total = 2 * len(setup.tasks)
    assert (view.state, view.status.step, view.status.max_steps) == (RunState.ENDED, total, total)
    assert view.status.decode["decoders"] == 1
    assert (view.curves["correct"][-1], view.curves["failed"][-1]) == (1.0, 0.0)
    card = json.loads((run / "dataset" / "card.json").read_text())
    assert view.curves["cost $"][-1] == pytest.approx(card["cost"]["cost_usd"])
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert events.Scalars("teacher/correct_rate")[-1].step == total
    lines = [json.loads(line) for line in (run / "logs" / "vz_ray.log").read_text().splitlines()]
    assert {line["run"] for line in lines} == {"watched"}
    retries = [line for line in lines if line["logger"].endswith("distill.teacher_client")]
    episodes = {f"0/{task.task_id}/{sample}#0" for task in setup.tasks for sample in range(2)}
    assert retries
    assert {line["episode"] for line in retries} <= episodes


def test_reflection_corrects_wrong_episodes(setup):
    def answer_wrongly(number, body):
        return make_completion(WRONG_ZOOM_TURN if not count_turns(body) else "<think>x</think><answer>Z</answer>")

    jobs = [TeacherJob(task, sample) for task in setup.tasks for sample in range(2)]
    with serve_endpoint(answer_wrongly) as endpoint:
        run_teacher_jobs(endpoint.url, jobs, setup.chat_format, EPISODE_CONFIG, setup.run("policy"))
    with serve_endpoint(ContinuationOracleServer(setup.tasks, setup.chat_format)) as endpoint:
        episodes = f"episodes=[{setup.run('policy') / 'exemplar.jsonl'}]"
        done = run_vz_ray("distill", "reflect", *setup.arguments(endpoint.url, "reflected"), episodes)
    assert done.returncode == 0, done.stderr
    dataset = setup.run("reflected") / "dataset"
    card = json.loads((dataset / "card.json").read_text())
    assert card["inputs"] == {"episodes": 2 * len(setup.tasks)}
    assert card["kept"] == card["prefix_turns"] == len(setup.tasks)
    for sample in json.loads((dataset / "sft.json").read_text()):
        weights = [m.get("weight") for m in sample["messages"] if m["role"] == "assistant"]
        assert weights[0] == 0
        assert set(weights[1:]) == {None}
    for trajectory in load_sft(dataset / "sft.json", setup):
        assert trajectory.answer is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tasks=missing.json", "no task file at missing.json"),
        ("model=missing", "model is missing; it must be the checkpoint directory"),
        ("teacher.api_key_env=NO_SUCH_KEY", "set NO_SUCH_KEY in the environment"),
        ("teacher.base_url=here", "teacher.base_url is 'here'"),
        ("teacher.prompt=missing.yaml", "missing.yaml"),
        ("filter.held_out=[missing.json]", "no task file at missing.json"),
        ("teacher.modle=x", "did you mean teacher.model"),
    ],
)
def test_invalid_input_is_reported_in_one_line(setup, change, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    arguments = setup.exemplar("http://127.0.0.1:9/v1", "bad", change)
    assert run_command(monkeypatch, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
