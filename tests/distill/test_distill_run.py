"""Distillation by the command line, against a real HTTP server: killed, resumed, stopped by its limit."""

from __future__ import annotations

import asyncio
import json
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.cli.test_app import run as run_cli
from tests.distill.conftest import RULES
from tests.distill.oracle_server import OracleServer, count_turns, make_completion
from tests.distill.test_reflection import WRONG, TakesOver
from tests.distill.test_teacher_runner import produce
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
from vz_ray.data.sft_file import SftFile
from vz_ray.data.task_file import read_tasks
from vz_ray.distill.teacher_runner import TeacherJob
from vz_ray.env.chat_format import ChatFormat
from vz_ray.env.task import Task
from vz_ray.env.trajectory import Trajectory
from vz_ray.monitoring.live_status import LiveStatus, RunState
from vz_ray.monitoring.run_view import read_run_view
from vz_ray.needle.quickstart import load_chat_format
from vz_ray.needle.synthesis import synthesize
from vz_ray.utils.json_lines import read_complete_lines
from vz_ray.video.frame import FrameSize
from vz_ray.video.local_source import LocalFrameSource

pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class DistillSetup:
    """Two videos, and the wire format of the tiny model that ships with the project."""

    folder: Path
    tasks: list[Task]
    wire: ChatFormat

    def exemplar(self, url: str, name: str, *more: str) -> list[str]:
        tasks = f"tasks={self.folder / 'needle' / 'train.json'}"
        return ["distill", "exemplar", *self.arguments(url, name), tasks, "attempts=2", *more]

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
def world(tmp_path_factory: pytest.TempPathFactory) -> DistillSetup:
    folder = tmp_path_factory.mktemp("distill")
    config = SynthConfig(
        directory=str(folder / "needle"), train=2, sft=0, validation=0, test=0, shot_s=[4], workers=1
    )
    path = synthesize(config)["train"]
    records = json.loads(path.read_text())
    for record in records:
        # So that a server that sees only the question knows which task it is.
        record["problem"] = f"<image>({record['problem_id']}) " + record["problem"].removeprefix("<image>")
    path.write_text(json.dumps(records))
    wire = load_chat_format(ROOT / "assets/tiny-base", RULES)
    return DistillSetup(folder, read_tasks(path), wire)


def learned(path: Path, world: DistillSetup) -> list[Trajectory]:
    """What `vz-ray sft` would learn from a file."""
    with LocalFrameSource() as frames:
        reading = SftFile.load(path).load_trajectories(world.wire, FrameSize(784, 784), frames)
        return asyncio.run(reading)


class Late(OracleServer):
    """So slow that there is time to stop whoever asks."""

    def __call__(self, number, body):
        return replace(super().__call__(number, body), delay_s=0.3)


def lines_with(kind: str, run: Path) -> int:
    path = run / "replies.jsonl"
    return sum(kind in line for line in read_complete_lines(path)) if path.exists() else 0


def test_killed_and_begun_again_it_pays_for_nothing_twice_and_leaves_a_whole_data_set(world):
    run = world.run("killed")
    with serve_endpoint(Late(world.tasks, world.wire)) as endpoint:
        arguments = world.exemplar(endpoint.url, "killed", "teacher.max_concurrency=2")
        process = start_vz_ray(*arguments)
        wait_until(lambda: lines_with("replied", run) >= 9, process)
        started = descendants(process)
        send_signal(process, signal.SIGKILL)
        process.wait()
        for one in started:
            one.kill()
        paid, before = lines_with("replied", run), len(endpoint.requests)
        unsure = lines_with("asked", run) - paid
        done = run_vz_ray(*arguments)
        assert done.returncode == 0, done.stderr
        asked_again = len(endpoint.requests) - before
    lines = list(read_complete_lines(run / "episodes" / "exemplar.jsonl"))
    turns = sum(len(line["trajectory"]["turns"]) for line in lines[1:])
    assert len(lines) - 1 == 2 * len(world.tasks)
    # What had been replied is not asked for again; what was on its way when it died is.
    assert asked_again == turns - paid
    assert before - paid <= unsure <= 2
    card = json.loads((run / "dataset" / "card.json").read_text())
    assert card["cost"]["usd"] == pytest.approx(0.015 * turns)
    assert card["cost"]["requests"] == turns + unsure
    assert card["played"] == 2 * len(world.tasks) == card["kept"] + sum(card["dropped"].values())
    assert card["kept"] == len(world.tasks)
    assert len(learned(run / "dataset" / "sft.json", world)) == card["kept"]
    assert "going on with" in done.stdout
    assert "Kept, by pattern" in done.stdout


def test_the_cost_limit_ends_it_with_a_line_that_says_how_to_go_on(world):
    with serve_endpoint(OracleServer(world.tasks, world.wire)) as endpoint:
        low = run_vz_ray(*world.exemplar(endpoint.url, "limited", "teacher.max_cost_usd=0.2"))
        assert low.returncode == 2
        assert f"data set: {world.run('limited') / 'dataset'}" in low.stdout
        live = LiveStatus.read(world.run("limited") / "live.json")
        assert live is not None
        assert (live.state, live.run_kind, live.max_steps) == ("failed", "episode", 2 * len(world.tasks))
        assert "teacher.max_cost_usd is 0.2" in live.error
        assert "teacher.max_cost_usd is 0.2; raise it" in low.stderr
        card = json.loads((world.run("limited") / "dataset" / "card.json").read_text())
        assert 0 < card["cost"]["usd"] <= 0.2
        assert card["played"] < card["planned"] == 2 * len(world.tasks)


def test_a_stop_finishes_what_is_paid_for_and_leaves_no_process(world):
    run = world.run("stopped")
    with serve_endpoint(Late(world.tasks, world.wire)) as endpoint:
        process = start_vz_ray(*world.exemplar(endpoint.url, "stopped"))
        wait_until(lambda: lines_with("replied", run) >= 3, process)
        started = descendants(process)
        send_signal(process, signal.SIGTERM)
        ended = wait_for_exit(process)
        assert ended.returncode == 130, ended.stderr
        assert "the same command goes on where it was, and pays for nothing twice" in ended.stderr
        assert not survivors(started)
    view = read_run_view(run)
    assert (view.state, view.status.run_kind) == (RunState.STOPPED, "episode")
    assert lines_with("asked", run) == lines_with("replied", run)


def test_a_distillation_is_watched_as_any_other_run(world):
    """`live.json`, rows for TensorBoard and trackers, and log lines that name run and episode."""

    def busy(number, body):
        """Refuses one request in three at first, which is noted in the log."""
        return FakeReply(status=503) if number % 3 == 1 else None

    run = world.run("watched")
    with serve_endpoint(OracleServer(world.tasks, world.wire, busy)) as endpoint:
        done = run_vz_ray(
            *world.exemplar(
                endpoint.url, "watched", "monitoring.log_format=json", "monitoring.poll_interval_s=1"
            )
        )
    assert done.returncode == 0, done.stderr
    view = read_run_view(run)
    assert view.status is not None
    total = 2 * len(world.tasks)
    assert (view.state, view.status.step, view.status.max_steps) == (RunState.ENDED, total, total)
    assert view.status.decode["decoders"] == 1
    assert (view.curves["right"][-1], view.curves["failed"][-1]) == (1.0, 0.0)
    card = json.loads((run / "dataset" / "card.json").read_text())
    assert view.curves["cost $"][-1] == pytest.approx(card["cost"]["usd"])
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert events.Scalars("teacher/correct_rate")[-1].step == total
    lines = [json.loads(line) for line in (run / "logs" / "vz_ray.log").read_text().splitlines()]
    assert {line["run"] for line in lines} == {"watched"}
    asked = [line for line in lines if line["logger"].endswith("distill.expert")]
    played = {f"0/{task.task_id}/{sample}#0" for task in world.tasks for sample in range(2)}
    assert asked
    assert {line["episode"] for line in asked} <= played


def test_what_the_policy_got_wrong_is_corrected(world):
    def misses(number, body):
        return make_completion(WRONG if not count_turns(body) else "<think>x</think><answer>Z</answer>")

    jobs = [TeacherJob(task, sample) for task in world.tasks for sample in range(2)]
    with serve_endpoint(misses) as endpoint:
        produce(endpoint.url, jobs, world.wire, RULES, world.run("policy"))
    with serve_endpoint(TakesOver(world.tasks, world.wire)) as endpoint:
        episodes = f"episodes=[{world.run('policy') / 'exemplar.jsonl'}]"
        done = run_vz_ray("distill", "reflect", *world.arguments(endpoint.url, "reflected"), episodes)
    assert done.returncode == 0, done.stderr
    dataset = world.run("reflected") / "dataset"
    card = json.loads((dataset / "card.json").read_text())
    assert card["came_in"] == {"episodes": 2 * len(world.tasks)}
    assert card["kept"] == card["given"] == len(world.tasks)
    for sample in json.loads((dataset / "sft.json").read_text()):
        weights = [m.get("weight") for m in sample["messages"] if m["role"] == "assistant"]
        assert weights[0] == 0
        assert set(weights[1:]) == {None}
    for trajectory in learned(dataset / "sft.json", world):
        assert trajectory.answer is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tasks=gone.json", "no task file at gone.json"),
        ("model=gone", "no checkpoint directory at gone"),
        ("teacher.api_key_env=NO_SUCH_KEY", "set NO_SUCH_KEY in the environment"),
        ("teacher.base_url=here", "expert.base_url is 'here'"),
        ("teacher.prompt=gone.yaml", "gone.yaml"),
        ("filter.held_out=[gone.json]", "no task file at gone.json"),
        ("teacher.modle=x", "did you mean expert.model"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_anything_starts(
    world, change, message, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    arguments = world.exemplar("http://127.0.0.1:9/v1", "bad", change)
    assert run_cli(monkeypatch, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
