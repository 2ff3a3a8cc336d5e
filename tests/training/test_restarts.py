"""A learner that dies is started again and training goes on, but not for ever."""

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

LOSS = LearnerDiedError("learner-rank-1 died during grpo_step (killed)")


def test_a_row_of_losses_has_an_end_that_names_the_rank_the_call_and_the_way_out() -> None:
    losses = RestartPolicy(2)
    losses.record_failure(LOSS, 4)
    losses.record_failure(LOSS, 4)
    with pytest.raises(UserError, match=r"^learner-rank-1 died during grpo_step") as ended:
        losses.record_failure(LOSS, 4)
    assert "loss 3 of the learner in a row" in str(ended.value)
    assert "above learner.max_restarts (2)" in str(ended.value)
    assert "the same command resumes from the last checkpoint" in str(ended.value)


def test_only_a_step_that_had_not_been_done_before_ends_the_row() -> None:
    losses = RestartPolicy(2)
    losses.record_failure(LOSS, 4)
    losses.record_failure(LOSS, 2)  # it went on from a checkpoint, and came less far than the last time
    losses.record_failure(LOSS, 5)
    losses.record_failure(LOSS, 5)
    assert losses.consecutive_failures == 2


def test_without_restarts_the_first_loss_ends_the_run() -> None:
    with pytest.raises(UserError, match=r"above learner.max_restarts \(0\)"):
        RestartPolicy(0).record_failure(LOSS, 7)


class Learner:
    """Stands for the group of ranks: counts how often it was started."""

    def __init__(self, *, dies_at_start: bool = False) -> None:
        self.started, self._dies_at_start = 0, dies_at_start

    async def restart(self) -> None:
        self.started += 1
        if self._dies_at_start:
            raise LOSS


def broken_by(cause: Exception) -> WeightIntegrityError:
    broken = WeightIntegrityError("weight version 3 was not sent")
    broken.__cause__ = cause
    return broken


async def run(learner: Learner, ends: list[Exception | None], metrics: Path, steps: int = 0) -> int:
    """Work that ends as `ends` say, one after the other, each time after so many further steps."""
    tries = 0

    async def work() -> int:
        nonlocal tries
        with MetricLogger(metrics) as log:
            for step in range(steps):
                log.log(tries * steps + step, {})
        tries += 1
        if (end := ends.pop(0)) is not None:
            raise end
        return tries

    with Interrupt() as interrupt:
        return await run_with_restarts(learner, work, max_restarts=2, metrics=metrics, interrupt=interrupt)  # type: ignore[arg-type]


async def test_work_is_begun_again_after_each_loss_also_one_that_broke_a_publish(tmp_path: Path) -> None:
    learner = Learner()
    assert await run(learner, [LOSS, broken_by(LOSS), None], tmp_path / "metrics.jsonl") == 3
    assert learner.started == 2


async def test_losses_do_not_end_training_that_gets_on(tmp_path: Path) -> None:
    learner = Learner()
    assert await run(learner, [LOSS] * 6 + [None], tmp_path / "metrics.jsonl", steps=1) == 7
    assert learner.started == 6


async def test_a_learner_that_cannot_be_started_again_ends_the_run(tmp_path: Path) -> None:
    learner = Learner(dies_at_start=True)
    with pytest.raises(UserError, match="loss 3 of the learner in a row"):
        await run(learner, [LOSS], tmp_path / "metrics.jsonl")
    assert learner.started == 2


@pytest.mark.parametrize("error", [broken_by(OSError("full")), StopRequested("SIGTERM"), UserError("other")])
async def test_whatever_else_goes_wrong_is_raised_as_it_is(error: Exception, tmp_path: Path) -> None:
    learner = Learner()
    with pytest.raises(type(error)):
        await run(learner, [error], tmp_path / "metrics.jsonl")
    assert not learner.started


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_learner_that_is_killed_in_mid_run_comes_back_and_no_episode_is_lost(tmp_path: Path) -> None:
    """SIGKILL after the third of four iterations: the third is played again from the checkpoint before it."""
    small, iterations = SmallRun.create(tmp_path), 4
    sizes = [f"train.max_steps={iterations}", "train.checkpoint_every=2"]
    run = small.runs / "lost"
    process = start_vz_ray("train", "conf/tiny.yaml", "name=lost", *small.overrides(), *sizes)
    wait_until(lambda: (run / "checkpoints/step-000002").is_dir(), process)
    started = descendants(process)
    [rank] = [p for p in started if " ".join(p.cmdline()).startswith("ray::LearnerRank")]
    wait_until(lambda: (run / "episodes/000002.jsonl").exists(), process)
    rank.kill()
    done = wait_for_exit(process)
    assert done.returncode == 0, done.stderr
    assert "learner-rank-0 died during" in done.stderr
    assert "it is started again" in done.stderr
    assert not survivors(started)

    cursor = TaskSampler(read_tasks(small.data("train")), seed=0)
    assert tasks_by_step(run) == [{t.task_id for t in cursor.next_tasks(2)} for _ in range(iterations)]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(iterations))
    assert max(row["mismatch/logprob_abs_max"] for row in rows) <= 1e-4
    # The engine lived on, and got the learner's weights under a version that it had not seen.
    assert [path.name for path in (run / "logs").glob("rollout-?.log")] == ["rollout-0.log"]
    versions = [row["weight_sync/version"] for row in rows]
    assert versions == sorted(set(versions))
    assert versions[2] > 4
    assert (run / "models/policy/config.json").is_file()
