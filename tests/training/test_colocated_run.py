"""Colocated runs of the real engines and the real learner; on CPU, sleeping engines keep their memory."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

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

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

COLOCATED = ("train.colocate=true", "weights.transport=ipc", "weights.bucket_mib=1")
TIMED = ("seconds", "_per_second", "memory/", "time")


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return SmallRun.create(tmp_path_factory.mktemp("colocated"))


def deterministic_rows(run: Path) -> list[dict[str, Any]]:
    """Return the rows without times, memory, weight versions, which continue after a resume, and cold caches."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    excluded = (*TIMED, "weight_sync/", "cache_hit_rate")
    return [{name: value for name, value in row.items() if not any(part in name for part in excluded)} for row in rows]


def test_stopped_and_resumed_colocated_run_equals_a_plain_run(small_run: SmallRun) -> None:
    arguments = ["train", "conf/laptop.yaml", *small_run.overrides(), "train.max_steps=3"]
    plain = run_vz_ray(*arguments, "name=plain", timeout_s=600)
    assert plain.returncode == 0, plain.stderr
    run = small_run.runs / "colocated"

    process = start_vz_ray(*arguments, *COLOCATED, "name=colocated")
    wait_until(lambda: (run / "episodes/000000.jsonl").exists(), process, 600)
    processes = descendants(process)
    send_signal(process, signal.SIGINT)
    stopped = wait_for_exit(process, 600)
    assert stopped.returncode == 130, stopped.stderr
    assert not survivors(processes)
    assert len(deterministic_rows(run)) < 3

    resumed = run_vz_ray(*arguments, *COLOCATED, "name=colocated", timeout_s=600)
    assert resumed.returncode == 0, resumed.stderr
    assert deterministic_rows(run) == deterministic_rows(small_run.runs / "plain")
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["time/sleep_seconds"] > 0
    assert row["weight_sync/wake_seconds"] > 0
    exported = [small_run.runs / name / "models/policy/model.safetensors" for name in ("plain", "colocated")]
    assert exported[0].read_bytes() == exported[1].read_bytes()


def test_two_ranks_continue_after_a_lost_worker_and_a_lost_rank(small_run: SmallRun) -> None:
    run, max_steps = small_run.runs / "lost", 4
    process = start_vz_ray(
        *["train", "conf/laptop.yaml", *small_run.overrides(), *COLOCATED, "name=lost", f"train.max_steps={max_steps}"],
        *["learner.world_size=2", "learner.zero_stage=3", "rollout.num_workers=2", "ray.num_cpus=6"],
        "rollout.health_check_interval_s=0.5",
    )
    processes: dict[str, list[Any]] = {}

    def kill(actor: str) -> None:
        processes["all"] = descendants(process)
        next(p for p in processes["all"] if command_line(p).startswith(f"ray::{actor}")).kill()

    wait_until(lambda: (run / "checkpoints/step-000001").is_dir(), process, 600)
    kill("RolloutWorkerActor")
    wait_until(lambda: (run / "checkpoints/step-000002").is_dir(), process, 600)
    kill("LearnerActor")
    done = wait_for_exit(process, 600)
    assert done.returncode == 0, done.stderr
    assert "Restarting the learner from its newest checkpoint" in done.stderr
    assert not survivors(processes["all"])
    assert [len(tasks) for tasks in tasks_by_step(run)] == [2] * max_steps
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(max_steps))
    assert all(row["weight_sync/probe_gap"] <= row["weight_sync/probe_tolerance"] for row in rows)
