"""What is played of an evaluation, and what its log already holds; the workers are scripted."""

from __future__ import annotations

from pathlib import Path

from tests.rollout.test_rollout_scheduler import TASKS, FakeWorkerClient
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.rollout import RolloutConfig
from vz_ray.env.trajectory import EpisodeId, EpisodeStatus, SamplingParams, TokenContext, Trajectory
from vz_ray.eval.eval_log import EvalLog, EvalResult
from vz_ray.eval.runner import evaluate
from vz_ray.rollout.rollout_scheduler import RolloutScheduler
from vz_ray.weight_sync import WeightPublisher


async def played(path: Path, samples: int) -> tuple[list[EpisodeId], EvalLog, list[int]]:
    """What a worker was asked to play of two tasks, the log, and the progress that was told."""
    worker, told = FakeWorkerClient("w"), list[int]()
    fleet = RolloutScheduler(lambda name: worker, RolloutConfig(num_workers=1), WeightPublisher(timeout_s=5))
    await fleet.start()
    log = EvalLog(path, {"model": "m"})
    drawn = SamplingParams(1.0, seed=1)
    await evaluate(
        fleet,
        TASKS[:2],
        log,
        EpisodeConfig(),
        stage="s",
        samples_per_task=samples,
        sampling_params=drawn,
        on_progress=told.append,
    )
    await fleet.close()
    return [id for id, _ in worker.played], log, told


async def test_a_question_is_played_once_unless_more_samples_are_asked_for(tmp_path: Path) -> None:
    asked, log, told = await played(tmp_path / "one.jsonl", 1)
    assert sorted((id.task_id, id.sample) for id in asked) == [("t0", 0), ("t1", 0)] == sorted(log.completed)
    assert sum(told) == 2
    asked, log, _ = await played(tmp_path / "three.jsonl", 3)
    assert len(asked) == len(log.records) == 6


async def test_a_task_that_lacks_a_sample_is_played_again_and_what_there_is_stays(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    log = EvalLog(path, {"model": "m"})
    first = {
        (task.task_id, sample): EvalResult(
            task,
            Trajectory(
                EpisodeId(0, task.task_id, sample), "old", TokenContext(()), (), EpisodeStatus.ANSWERED
            ),
        )
        for task, sample in [(TASKS[0], 0), (TASKS[0], 1), (TASKS[1], 0)]
    }
    for result in first.values():
        log.append(result)
    asked, log, told = await played(path, 2)
    assert sorted((id.task_id, id.sample) for id in asked) == [("t1", 0), ("t1", 1)]
    assert told == [1, 1]
    found = {(r.task.task_id, r.trajectory.id.sample): r.trajectory.chat_format for r in log.records}
    assert found == {("t0", 0): "old", ("t0", 1): "old", ("t1", 0): "old", ("t1", 1): "wire"}
    assert (await played(path, 2))[0] == []
