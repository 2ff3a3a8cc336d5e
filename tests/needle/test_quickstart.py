"""Complete quickstart and training runs with real components, and their resume."""

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
def small_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return SmallRun.create(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def finished(small_run: SmallRun) -> Path:
    """Run directory of a finished quickstart."""
    done = run_vz_ray("quickstart", "--name", "whole", *small_run.quickstart(), timeout_s=500)
    assert done.returncode == 0, done.stderr
    return small_run.runs / "whole"


def read_summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def test_summary_covers_every_stage(finished):
    summary = read_summary(finished)
    assert set(summary["accuracy"]) == {"cold_start", "rl", "sft_continued", "uniform"}
    assert set(summary["accuracy"]["uniform"]) == {"8", "128"}
    assert {"rl", "cold_start"} <= set(summary["frames_mean"])
    assert "rl" in summary["zooms_mean"]
    assert "rl" in summary["event_coverage"]
    assert summary["questions"]["rl"] == 4
    assert {"synth", "cold start", "rl", "controls", "evaluate", "total"} <= set(summary["wall_s"])
    assert summary["wall_s"]["total"] > 0


def test_published_weights_match_learner(finished):
    summary = read_summary(finished)
    assert summary["weights"]["published"] == 2
    assert summary["weights"]["sync_seconds_median"] > 0
    assert 0 <= summary["mismatch"]["logprob_abs_max"] <= 1e-4
    assert summary["mismatch"]["kl"] <= 1e-6


async def test_frame_refs_resolve_to_same_frames(finished):
    records = [r for path in sorted((finished / "episodes").glob("*.jsonl")) for r in read_records(path)]
    assert len(records) == 2 * 2 * 2
    refs: list[FrameRef] = [ref for record in records for ref in record.trajectory.frame_refs]
    assert len(refs) >= 16 * len(records)
    with LocalFrameSource() as frames:
        resolved = await frames.resolve(list(dict.fromkeys(refs)))
    assert [frame.ref for frame in resolved] == list(dict.fromkeys(refs))


def test_report_is_written(finished):
    page = (finished / "report.html").read_text()
    assert page.rstrip().endswith("</html>")
    assert "data:image" in page


def test_finished_run_is_not_rerun(small_run, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    done = run_vz_ray("quickstart", "--name", "whole", *small_run.quickstart())
    assert done.returncode == 0, done.stderr
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert changed <= {"summary.json", ".lock"}


def test_other_config_of_same_name_is_rejected(small_run, finished):
    done = run_vz_ray("quickstart", "--name", "whole", *small_run.quickstart(), "train.group_size=3")
    assert done.returncode == 2
    assert (
        "holds a run with another configuration (stored: 'train.group_size: 2', now: 'train.group_size: 3')"
        in done.stderr
    )


def assert_complete(small_run: SmallRun, run: Path, steps: int, staleness: int) -> None:
    """Check the output of a training run with two tasks per step."""
    sampler = TaskSampler(read_tasks(small_run.data("train")), seed=0)
    assert tasks_by_step(run) == [{t.task_id for t in sampler.next_tasks(2)} for _ in range(steps)]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(steps))
    # Rollout runs during learning with bounded staleness. Equal weights give equal log-probs.
    assert max(row["staleness/max"] for row in rows) == staleness
    assert max(row["mismatch/logprob_abs_max"] for row in rows) <= 1e-4
    assert (run / "models/policy/config.json").is_file()


def train_arguments(small_run: SmallRun, name: str, steps: int, staleness: int) -> list[str]:
    return [
        "train",
        "conf/laptop.yaml",
        f"name={name}",
        f"train.max_steps={steps}",
        f"train.max_staleness={staleness}",
        *small_run.overrides(),
        "learner.loss.tis_cap=2.0",
    ]


def stop_run(process: subprocess.Popen[str], number: int) -> str:
    """Send a signal, check the exit status and that no process survives; return stderr."""
    # After SIGKILL, Ray's agents exit on their own with a delay.
    agents = ("ray::RuntimeEnvAgent", "ray::DashboardAgent") if number == signal.SIGKILL else ()
    children = [child for child in descendants(process) if not command_line(child).startswith(agents)]
    send_signal(process, number)
    done = wait_for_exit(process, 120)
    assert not survivors(children)
    assert done.returncode == (130 if number == signal.SIGTERM else -number), done.stderr
    return done.stderr


@pytest.mark.slow
def test_training_survives_learner_death_kill_and_stop(small_run):
    """Combines all failures in one run, since each start is slow."""
    arguments, run = train_arguments(small_run, "outlives", 7, 1), small_run.runs / "outlives"

    def is_saved(step: int) -> Callable[[], bool]:
        return lambda: (run / f"checkpoints/step-{step:06d}").is_dir()

    process = start_vz_ray(*arguments)
    wait_until(is_saved(1), process)
    [rank] = [p for p in descendants(process) if " ".join(p.cmdline()).startswith("ray::LearnerActor")]
    rank.kill()
    wait_until(is_saved(3), process)
    assert "learner-rank-0 died during" in stop_run(process, signal.SIGKILL)
    assert not (run / "models/policy").exists()

    process = start_vz_ray(*arguments)
    wait_until(is_saved(5), process)
    assert "the same command resumes from the last checkpoint" in stop_run(process, signal.SIGTERM)

    done = run_vz_ray(*arguments)
    assert done.returncode == 0, done.stderr
    assert_complete(small_run, run, 7, 1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("staleness", [0, 1])
def test_training_resumes_with_next_tasks(small_run, number, staleness):
    name = f"stopped-{number}-{staleness}"
    arguments, run = train_arguments(small_run, name, 6, staleness), small_run.runs / name
    process = start_vz_ray(*arguments)
    wait_until(lambda: (run / "checkpoints/step-000001").is_dir(), process)
    stop_run(process, number)
    done = run_vz_ray(*arguments)
    assert done.returncode == 0, done.stderr
    assert_complete(small_run, run, 6, staleness)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_quickstart_resumes_in_every_stage(small_run):
    """Interrupts an SFT stage, an evaluation, and the training of the controls."""
    steps = 30
    arguments = [
        "quickstart",
        "--name",
        "often-stopped",
        *small_run.quickstart(),
        f"cold_start.max_steps={steps}",
        f"sft_continued.max_steps={steps}",
    ]
    run = small_run.runs / "often-stopped"
    for output in ("cold_start.jsonl", "eval/cold_start.jsonl", "sft_continued.jsonl"):
        process = start_vz_ray(*arguments)
        wait_until(lambda path=run / output: path.exists() and path.read_text().count("\n") > 0, process, 400)
        children = descendants(process)
        send_signal(process)
        done = wait_for_exit(process, 120)
        assert done.returncode == 130, done.stderr
        assert "the same command resumes from the last checkpoint" in done.stderr
        assert not survivors(children)

    done = run_vz_ray(*arguments, timeout_s=500)
    assert done.returncode == 0, done.stderr
    for stage in ("cold_start", "sft_continued"):
        steps_logged = [json.loads(line)["step"] for line in (run / f"{stage}.jsonl").read_text().splitlines()]
        assert steps_logged == list(range(1, steps + 1))
    assert read_summary(run)["questions"]["cold_start"] == 4
