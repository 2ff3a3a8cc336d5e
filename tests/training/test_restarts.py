"""Restarts of the learner after lost ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.small_run import (
    SmallRun,
    descendants,
    start_vz_ray,
    survivors,
    tasks_by_step,
    wait_for_exit,
    wait_until,
)
from vz_ray.data.task_file import read_tasks
from vz_ray.data.task_sampler import TaskSampler
from vz_ray.learner.learner import LearnerDiedError
from vz_ray.monitoring.metric_logger import MetricLogger
from vz_ray.training.restarts import RestartPolicy, run_with_restarts
from vz_ray.utils.errors import UserError
from vz_ray.utils.interrupt import Interrupt, StopRequested
from vz_ray.weight_sync.weight_store import WeightIntegrityError

FAILURE = LearnerDiedError("learner-rank-1 died during grpo_step (killed)")


def test_too_many_failures_name_rank_call_and_fix() -> None:
    policy = RestartPolicy(2)
    policy.record_failure(FAILURE, 4)
    policy.record_failure(FAILURE, 4)
    with pytest.raises(UserError, match=r"^learner-rank-1 died during grpo_step") as error_info:
        policy.record_failure(FAILURE, 4)
    assert "3 consecutive learner failures" in str(error_info.value)
    assert "exceed learner.max_restarts (2)" in str(error_info.value)
    assert "The same command resumes from the newest checkpoint." in str(error_info.value)


def test_only_a_new_step_resets_the_count() -> None:
    policy = RestartPolicy(2)
    policy.record_failure(FAILURE, 4)
    policy.record_failure(FAILURE, 2)  # resumed from a checkpoint, and failed before reaching step 4 again
    policy.record_failure(FAILURE, 5)
    policy.record_failure(FAILURE, 5)
    assert policy.consecutive_failures == 2


def test_first_failure_stops_run_without_restarts() -> None:
    with pytest.raises(UserError, match=r"exceed learner.max_restarts \(0\)"):
        RestartPolicy(0).record_failure(FAILURE, 7)


class FakeLearner:
    """Counts restarts."""

    def __init__(self, *, fails_at_restart: bool = False) -> None:
        self.restarts, self._fails_at_restart = 0, fails_at_restart

    async def restart(self) -> None:
        self.restarts += 1
        if self._fails_at_restart:
            raise FAILURE


def publish_error(cause: Exception) -> WeightIntegrityError:
    error = WeightIntegrityError("weight version 3 was not sent")
    error.__cause__ = cause
    return error


async def run(learner: FakeLearner, outcomes: list[Exception | None], metrics: Path, steps: int = 0) -> int:
    """Train `steps` steps per attempt; each attempt has the next outcome. Return the attempts."""
    attempts = 0

    async def train() -> int:
        nonlocal attempts
        with MetricLogger(metrics) as log:
            for step in range(steps):
                log.log(attempts * steps + step, {})
        attempts += 1
        if (error := outcomes.pop(0)) is not None:
            raise error
        return attempts

    with Interrupt() as interrupt:
        return await run_with_restarts(learner, train, max_restarts=2, metrics=metrics, interrupt=interrupt)  # type: ignore[arg-type]


async def test_training_resumes_after_each_failure(tmp_path: Path) -> None:
    learner = FakeLearner()
    assert await run(learner, [FAILURE, publish_error(FAILURE), None], tmp_path / "metrics.jsonl") == 3
    assert learner.restarts == 2


async def test_resources_are_freed_before_each_restart(tmp_path: Path) -> None:
    calls, learner, outcomes = list[str](), FakeLearner(), [FAILURE, publish_error(FAILURE), None]

    async def free() -> None:
        calls.append(f"free before restart {learner.restarts + 1}")

    async def train() -> None:
        if (error := outcomes.pop(0)) is not None:
            raise error

    with Interrupt() as interrupt:
        await run_with_restarts(
            learner,  # type: ignore[arg-type]
            train,
            before_restart=free,
            max_restarts=2,
            metrics=tmp_path / "metrics.jsonl",
            interrupt=interrupt,
        )
    assert calls == ["free before restart 1", "free before restart 2"]


async def test_failures_with_progress_do_not_stop_training(tmp_path: Path) -> None:
    learner = FakeLearner()
    assert await run(learner, [FAILURE] * 6 + [None], tmp_path / "metrics.jsonl", steps=1) == 7
    assert learner.restarts == 6


async def test_failing_restarts_stop_the_run(tmp_path: Path) -> None:
    learner = FakeLearner(fails_at_restart=True)
    with pytest.raises(UserError, match="3 consecutive learner failures"):
        await run(learner, [FAILURE], tmp_path / "metrics.jsonl")
    assert learner.restarts == 2


@pytest.mark.parametrize("error", [publish_error(OSError("full")), StopRequested("SIGTERM"), UserError("other")])
async def test_other_errors_are_raised(error: Exception, tmp_path: Path) -> None:
    learner = FakeLearner()
    with pytest.raises(type(error)):
        await run(learner, [error], tmp_path / "metrics.jsonl")
    assert not learner.restarts


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_learner_restarts_without_losing_episodes(tmp_path: Path) -> None:
    """Kill the rank during step 2 of 4: the run resumes from the checkpoint of step 2."""
    small, max_steps = SmallRun.create(tmp_path), 4
    overrides = [f"train.max_steps={max_steps}", "train.checkpoint_every=2"]
    run = small.runs / "lost"
    process = start_vz_ray("train", "conf/laptop.yaml", "name=lost", *small.overrides(), *overrides)
    wait_until(lambda: (run / "checkpoints/step-000002").is_dir(), process)
    processes = descendants(process)
    [rank] = [p for p in processes if " ".join(p.cmdline()).startswith("ray::LearnerActor")]
    wait_until(lambda: (run / "episodes/000002.jsonl").exists(), process)
    rank.kill()
    done = wait_for_exit(process)
    assert done.returncode == 0, done.stderr
    assert "learner-rank-0 died during" in done.stderr
    assert "Restarting the learner from its newest checkpoint" in done.stderr
    assert not survivors(processes)

    sampler = TaskSampler(read_tasks(small.data("train")), seed=0)
    assert tasks_by_step(run) == [{t.task_id for t in sampler.next_tasks(2)} for _ in range(max_steps)]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(max_steps))
    assert max(row["mismatch/logprob_abs_max"] for row in rows) <= 1e-4
    # The engine kept running and received the weights under a new version.
    assert [path.name for path in (run / "logs").glob("rollout-?.log")] == ["rollout-0.log"]
    versions = [row["weight_sync/version"] for row in rows]
    assert versions == sorted(set(versions))
    assert versions[2] > 4
    assert (run / "models/policy/config.json").is_file()
