"""Distillation by the command line, against a real HTTP server: killed, resumed, stopped by its limit."""

from __future__ import annotations

import asyncio
import json
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.coldstart.distill.conftest import RULES
from tests.coldstart.distill.serving import OracleServer, said, turns_of
from tests.coldstart.distill.test_reflect import WRONG, TakesOver
from tests.coldstart.distill.test_studio import produce
from tests.reward.endpoint import Reply, serving
from tests.small_run import ROOT, begin, below, finish, left_of, stop, vz_ray, wait_for
from tests.test_cli import run as run_cli
from vz_ray.coldstart.distill.studio import Job
from vz_ray.config.data import SynthConfig
from vz_ray.data.needle.synth import synthesize
from vz_ray.data.record import whole_lines
from vz_ray.data.rl_file import read_tasks
from vz_ray.data.sft_file import SftFile
from vz_ray.data.task import Task
from vz_ray.episode.trajectory import Trajectory
from vz_ray.episode.wire import WireFormat
from vz_ray.observe.live import Live, State
from vz_ray.quickstart import wire_of
from vz_ray.video.frame import FrameSize
from vz_ray.video.local import LocalFrames
from vz_ray.watch.looking import look

pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class World:
    """Two videos, and the wire format of the tiny model that ships with the project."""

    folder: Path
    tasks: list[Task]
    wire: WireFormat

    def exemplar(self, url: str, name: str, *more: str) -> list[str]:
        tasks = f"tasks={self.folder / 'needle' / 'train.json'}"
        return ["distill", "exemplar", *self.arguments(url, name), tasks, "attempts=2", *more]

    def arguments(self, url: str, name: str) -> list[str]:
        return [
            "conf/distill/needle.yaml",
            f"runs={self.folder / 'runs'}",
            f"name={name}",
            "expert.model=oracle",
            f"expert.base_url={url}",
            "expert.input_usd=10",
            "expert.output_usd=100",
            "expert.backoff_s=0.1",
        ]

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
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
    wire = wire_of(ROOT / "assets/tiny-base", RULES)
    return World(folder, read_tasks(path), wire)


def learned(path: Path, world: World) -> list[Trajectory]:
    """What `vz-ray sft` would learn from a file."""
    with LocalFrames() as frames:
        reading = SftFile.load(path).trajectories(world.wire, FrameSize(784, 784), frames)
        return asyncio.run(reading)


class Late(OracleServer):
    """So slow that there is time to stop whoever asks."""

    def __call__(self, number, body):
        return replace(super().__call__(number, body), after_s=0.3)


def lines_with(kind: str, run: Path) -> int:
    path = run / "replies.jsonl"
    return sum(kind in line for line in whole_lines(path)) if path.exists() else 0


def test_killed_and_begun_again_it_pays_for_nothing_twice_and_leaves_a_whole_data_set(world):
    run = world.run("killed")
    with serving(Late(world.tasks, world.wire)) as endpoint:
        arguments = world.exemplar(endpoint.url, "killed", "expert.concurrency=2")
        process = begin(*arguments)
        wait_for(lambda: lines_with("replied", run) >= 9, process)
        started = below(process)
        stop(process, signal.SIGKILL)
        process.wait()
        for one in started:
            one.kill()
        paid, before = lines_with("replied", run), len(endpoint.requests)
        unsure = lines_with("asked", run) - paid
        done = vz_ray(*arguments)
        assert done.returncode == 0, done.stderr
        asked_again = len(endpoint.requests) - before
    lines = list(whole_lines(run / "episodes" / "exemplar.jsonl"))
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
    with serving(OracleServer(world.tasks, world.wire)) as endpoint:
        low = vz_ray(*world.exemplar(endpoint.url, "limited", "expert.limit_usd=0.2"))
        assert low.returncode == 2
        assert f"data set: {world.run('limited') / 'dataset'}" in low.stdout
        live = Live.read(world.run("limited") / "live.json")
        assert live is not None
        assert (live.state, live.unit, live.iterations) == ("failed", "episode", 2 * len(world.tasks))
        assert "expert.limit_usd is 0.2" in live.error
        assert "expert.limit_usd is 0.2; raise it" in low.stderr
        card = json.loads((world.run("limited") / "dataset" / "card.json").read_text())
        assert 0 < card["cost"]["usd"] <= 0.2
        assert card["played"] < card["planned"] == 2 * len(world.tasks)


def test_a_stop_finishes_what_is_paid_for_and_leaves_no_process(world):
    run = world.run("stopped")
    with serving(Late(world.tasks, world.wire)) as endpoint:
        process = begin(*world.exemplar(endpoint.url, "stopped"))
        wait_for(lambda: lines_with("replied", run) >= 3, process)
        started = below(process)
        stop(process, signal.SIGTERM)
        ended = finish(process)
        assert ended.returncode == 130, ended.stderr
        assert "the same command goes on where it was, and pays for nothing twice" in ended.stderr
        assert not left_of(started)
    view = look(run)
    assert (view.state, view.live.unit) == (State.STOPPED, "episode")
    assert lines_with("asked", run) == lines_with("replied", run)


def test_a_distillation_is_watched_as_any_other_run(world):
    """`live.json`, rows for TensorBoard and trackers, and log lines that name run and episode."""

    def busy(number, body):
        """Refuses one request in three at first, which is noted in the log."""
        return Reply(status=503) if number % 3 == 1 else None

    run = world.run("watched")
    with serving(OracleServer(world.tasks, world.wire, busy)) as endpoint:
        done = vz_ray(
            *world.exemplar(endpoint.url, "watched", "observe.log_format=json", "observe.pulse_s=1")
        )
    assert done.returncode == 0, done.stderr
    view = look(run)
    assert view.live is not None
    total = 2 * len(world.tasks)
    assert (view.state, view.live.iteration, view.live.iterations) == (State.ENDED, total, total)
    assert view.live.clips["decoders"] == 1
    assert (view.curves["right"][-1], view.curves["failed"][-1]) == (1.0, 0.0)
    card = json.loads((run / "dataset" / "card.json").read_text())
    assert view.curves["cost $"][-1] == pytest.approx(card["cost"]["usd"])
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert events.Scalars("expert/right")[-1].step == total
    lines = [json.loads(line) for line in (run / "logs" / "vz_ray.log").read_text().splitlines()]
    assert {line["run"] for line in lines} == {"watched"}
    asked = [line for line in lines if line["logger"].endswith("distill.expert")]
    played = {f"0/{task.task_id}/{sample}#0" for task in world.tasks for sample in range(2)}
    assert asked
    assert {line["episode"] for line in asked} <= played


def test_what_the_policy_got_wrong_is_corrected(world):
    def misses(number, body):
        return said(WRONG if not turns_of(body) else "<think>x</think><answer>Z</answer>")

    jobs = [Job(task, sample) for task in world.tasks for sample in range(2)]
    with serving(misses) as endpoint:
        produce(endpoint.url, jobs, world.wire, RULES, world.run("policy"))
    with serving(TakesOver(world.tasks, world.wire)) as endpoint:
        episodes = f"episodes=[{world.run('policy') / 'exemplar.jsonl'}]"
        done = vz_ray("distill", "reflect", *world.arguments(endpoint.url, "reflected"), episodes)
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
        ("expert.api_key_env=NO_SUCH_KEY", "set NO_SUCH_KEY in the environment"),
        ("expert.base_url=here", "expert.base_url is 'here'"),
        ("expert.prompt=gone.yaml", "gone.yaml"),
        ("curate.against=[gone.json]", "no task file at gone.json"),
        ("expert.modle=x", "did you mean expert.model"),
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
