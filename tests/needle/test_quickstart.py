"""A whole run with every part the real one, and what is left when it is stopped."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.small_run import (
    SmallRun,
    command_line,
    descendants,
    run_vz_ray,
    send_signal,
    start_vz_ray,
    survivors,
    tasks_by_step,
    wait_for_exit,
    wait_until,
)
from vz_ray.data.episode_record import read_records
from vz_ray.data.task_file import read_tasks
from vz_ray.data.task_sampler import TaskSampler
from vz_ray.video.frame import FrameRef
from vz_ray.video.local_source import LocalFrameSource

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return SmallRun.create(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def finished(small: SmallRun) -> Path:
    """The run directory of a quickstart that went through."""
    done = run_vz_ray("quickstart", "--name", "whole", *small.quickstart(), timeout_s=500)
    assert done.returncode == 0, done.stderr
    return small.runs / "whole"


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def test_every_stage_leaves_its_figures(finished):
    found = summary(finished)
    assert set(found["accuracy"]) == {"cold_start", "rl", "sft_continued", "uniform"}
    assert set(found["accuracy"]["uniform"]) == {"8", "128"}
    assert {"rl", "cold_start"} <= set(found["frames_mean"])
    assert "rl" in found["zooms_mean"]
    assert "rl" in found["event_coverage"]
    assert found["questions"]["rl"] == 4
    assert {"synth", "cold start", "rl", "controls", "evaluate", "total"} <= set(found["wall_s"])
    assert found["wall_s"]["total"] > 0


def test_weights_are_published_each_iteration_and_the_engine_agrees_with_the_learner(finished):
    found = summary(finished)
    assert found["weights"]["published"] == 2
    assert found["weights"]["sync_seconds_median"] > 0
    assert 0 <= found["mismatch"]["logprob_abs_max"] <= 1e-4
    assert found["mismatch"]["kl"] <= 1e-6


async def test_episodes_hold_references_from_which_the_same_frames_come_back(finished):
    records = [r for path in sorted((finished / "episodes").glob("*.jsonl")) for r in read_records(path)]
    assert len(records) == 2 * 2 * 2
    refs: list[FrameRef] = [ref for record in records for ref in record.trajectory.frame_refs]
    assert len(refs) >= 16 * len(records)
    with LocalFrameSource() as frames:
        shown = await frames.resolve(list(dict.fromkeys(refs)))
    assert [frame.ref for frame in shown] == list(dict.fromkeys(refs))


def test_the_report_is_written(finished):
    page = (finished / "report.html").read_text()
    assert page.rstrip().endswith("</html>")
    assert "data:image" in page


def test_a_finished_run_is_only_shown_again(small, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    done = run_vz_ray("quickstart", "--name", "whole", *small.quickstart())
    assert done.returncode == 0, done.stderr
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert changed <= {"summary.json", ".lock"}


def test_another_configuration_of_the_same_name_is_refused(small, finished):
    done = run_vz_ray("quickstart", "--name", "whole", *small.quickstart(), "train.group_size=3")
    assert done.returncode == 2
    assert "holds a run of another configuration ('samples: 2' there, 'samples: 3' now)" in done.stderr


def goes_on(small: SmallRun, run: Path, iterations: int, behind: int) -> None:
    """What a run of two tasks an iteration must have left, whatever happened to it on the way."""
    cursor = TaskSampler(read_tasks(small.data("train")), seed=0)
    assert tasks_by_step(run) == [{t.task_id for t in cursor.next_tasks(2)} for _ in range(iterations)]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(iterations))
    # Engines played on while the learner worked, never further behind than allowed; where weights
    # are the same, so are log-probs.
    assert max(row["staleness/max"] for row in rows) == behind
    assert max(row["mismatch/logprob_abs_max"] for row in rows) <= 1e-4
    assert (run / "models/policy/config.json").is_file()


def training(small: SmallRun, name: str, iterations: int, behind: int) -> list[str]:
    return [
        "train",
        "conf/tiny.yaml",
        f"name={name}",
        f"train.max_steps={iterations}",
        f"train.max_staleness={behind}",
        *small.overrides(),
        "learner.loss.tis_cap=2.0",
    ]


def ended(process: subprocess.Popen[str], number: int) -> str:
    """Sends a signal, checks that the run ended by it and left nobody behind; what it said."""
    # Nobody is left to end Ray's agents of a killed run: they notice after a while.
    agents = ("ray::RuntimeEnvAgent", "ray::DashboardAgent") if number == signal.SIGKILL else ()
    started = [one for one in descendants(process) if not command_line(one).startswith(agents)]
    send_signal(process, number)
    done = wait_for_exit(process, 120)
    assert not survivors(started)
    assert done.returncode == (130 if number == signal.SIGTERM else -number), done.stderr
    return done.stderr


@pytest.mark.slow
def test_training_outlives_its_learner_its_driver_and_being_asked_to_stop(small):
    """One run through all of it, since each start takes a while; the slow tests take them one by one."""
    arguments, run = training(small, "outlives", 7, 1), small.runs / "outlives"

    def saved(step: int) -> Callable[[], bool]:
        return lambda: (run / f"checkpoints/step-{step:06d}").is_dir()

    process = start_vz_ray(*arguments)
    wait_until(saved(1), process)
    [rank] = [p for p in descendants(process) if " ".join(p.cmdline()).startswith("ray::LearnerRank")]
    rank.kill()
    wait_until(saved(3), process)
    assert "learner-rank-0 died during" in ended(process, signal.SIGKILL)
    assert not (run / "models/policy").exists()

    process = start_vz_ray(*arguments)
    wait_until(saved(5), process)
    assert "the same command goes on from the last checkpoint" in ended(process, signal.SIGTERM)

    done = run_vz_ray(*arguments)
    assert done.returncode == 0, done.stderr
    goes_on(small, run, 7, 1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("behind", [0, 1])
def test_training_goes_on_from_its_checkpoint_with_the_tasks_that_would_have_come(small, number, behind):
    name = f"stopped-{number}-{behind}"
    arguments, run = training(small, name, 6, behind), small.runs / name
    process = start_vz_ray(*arguments)
    wait_until(lambda: (run / "checkpoints/step-000001").is_dir(), process)
    ended(process, number)
    again = run_vz_ray(*arguments)
    assert again.returncode == 0, again.stderr
    goes_on(small, run, 6, behind)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_quickstart_goes_on_in_whatever_stage_it_was_stopped(small):
    """Stopped in a supervised stage, between questions of an evaluation, and while the controls train."""
    steps = 30
    arguments = [
        "quickstart",
        "--name",
        "often-stopped",
        *small.quickstart(),
        f"cold_start.max_steps={steps}",
        f"sft_continued.max_steps={steps}",
    ]
    run = small.runs / "often-stopped"
    for product in ("cold_start.jsonl", "eval/cold_start.jsonl", "sft_continued.jsonl"):
        process = start_vz_ray(*arguments)
        wait_until(
            lambda path=run / product: path.exists() and path.read_text().count("\n") > 0, process, 400
        )
        started = descendants(process)
        send_signal(process)
        done = wait_for_exit(process, 120)
        assert done.returncode == 130, done.stderr
        assert "the same command goes on from the last checkpoint" in done.stderr
        assert not survivors(started)

    done = run_vz_ray(*arguments, timeout_s=500)
    assert done.returncode == 0, done.stderr
    for stage in ("cold_start", "sft_continued"):
        logged = [json.loads(line)["step"] for line in (run / f"{stage}.jsonl").read_text().splitlines()]
        assert logged == list(range(1, steps + 1))
    assert summary(run)["questions"]["cold_start"] == 4
