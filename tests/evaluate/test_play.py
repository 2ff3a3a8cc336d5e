"""What is played of an evaluation, and what its log already holds; the workers are scripted."""

from __future__ import annotations

from pathlib import Path

from tests.rollout.test_fleet import TASKS, Scripted
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.rollout import RolloutConfig
from vz_ray.episode.trajectory import Context, EpisodeId, Sampling, Status, Trajectory
from vz_ray.evaluate.play import evaluate
from vz_ray.evaluate.results import EvalLog, EvalResult
from vz_ray.rollout.fleet import Fleet
from vz_ray.weights import Publisher


async def played(path: Path, samples: int) -> tuple[list[EpisodeId], EvalLog, list[int]]:
    """What a worker was asked to play of two tasks, the log, and the progress that was told."""
    worker, told = Scripted("w"), list[int]()
    fleet = Fleet(lambda name: worker, RolloutConfig(workers=1), Publisher(deadline_s=5))
    await fleet.start()
    log = EvalLog(path, {"model": "m"})
    drawn = Sampling(1.0, seed=1)
    await evaluate(
        fleet,
        TASKS[:2],
        log,
        EpisodeConfig(),
        stage="s",
        samples=samples,
        sampling=drawn,
        advance=told.append,
    )
    await fleet.close()
    return [id for id, _ in worker.played], log, told


async def test_a_question_is_played_once_unless_more_samples_are_asked_for(tmp_path: Path) -> None:
    asked, log, told = await played(tmp_path / "one.jsonl", 1)
    assert sorted((id.task, id.sample) for id in asked) == [("t0", 0), ("t1", 0)] == sorted(log.done)
    assert sum(told) == 2
    asked, log, _ = await played(tmp_path / "three.jsonl", 3)
    assert len(asked) == len(log.records) == 6


async def test_a_task_that_lacks_a_sample_is_played_again_and_what_there_is_stays(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    log = EvalLog(path, {"model": "m"})
    first = {
        (task.task_id, sample): EvalResult(
            task, Trajectory(EpisodeId(0, task.task_id, sample), "old", Context(()), (), Status.ANSWERED)
        )
        for task, sample in [(TASKS[0], 0), (TASKS[0], 1), (TASKS[1], 0)]
    }
    for result in first.values():
        log.append(result)
    asked, log, told = await played(path, 2)
    assert sorted((id.task, id.sample) for id in asked) == [("t1", 0), ("t1", 1)]
    assert told == [1, 1]
    found = {(r.task.task_id, r.trajectory.id.sample): r.trajectory.wire for r in log.records}
    assert found == {("t0", 0): "old", ("t0", 1): "old", ("t1", 0): "old", ("t1", 1): "wire"}
    assert (await played(path, 2))[0] == []
