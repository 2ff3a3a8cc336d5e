"""Resumption of an evaluation with scripted workers."""

from __future__ import annotations

from pathlib import Path

from tests.rollout.fake_workers import TASKS, FakeWorkerClient
from vz_ray.config.episode import EpisodeConfig
from vz_ray.config.rollout import RolloutConfig
from vz_ray.env.trajectory import EpisodeId, EpisodeStatus, SamplingParams, TokenContext, Trajectory
from vz_ray.eval.eval_log import EvalLog, EvalResult
from vz_ray.eval.runner import evaluate
from vz_ray.rollout.rollout_scheduler import RolloutScheduler
from vz_ray.weight_sync import WeightPublisher


async def run_two_tasks(path: Path, samples: int) -> tuple[list[EpisodeId], EvalLog, list[int]]:
    """Return the episodes that a worker ran for two tasks, the log, and the progress updates."""
    worker, progress = FakeWorkerClient("w"), list[int]()
    scheduler = RolloutScheduler(lambda name: worker, RolloutConfig(num_workers=1), WeightPublisher(timeout_s=5))
    await scheduler.pool.start()
    log = EvalLog(path, {"model": "m"})
    await evaluate(
        scheduler,
        TASKS[:2],
        log,
        EpisodeConfig(),
        stage="s",
        samples_per_task=samples,
        sampling_params=SamplingParams(1.0, seed=1),
        on_progress=progress.append,
    )
    await scheduler.pool.close()
    return [episode_id for episode_id, _ in worker.episodes], log, progress


async def test_evaluation_runs_samples_per_task(tmp_path: Path) -> None:
    episodes, log, progress = await run_two_tasks(tmp_path / "one.jsonl", 1)
    assert sorted((episode.task_id, episode.sample) for episode in episodes) == [("t0", 0), ("t1", 0)]
    assert sorted(log.completed) == [("t0", 0), ("t1", 0)]
    assert sum(progress) == 2
    episodes, log, _ = await run_two_tasks(tmp_path / "three.jsonl", 3)
    assert len(episodes) == len(log.records) == 6


async def test_resume_reruns_task_with_missing_sample(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    log = EvalLog(path, {"model": "m"})
    logged = {
        (task.task_id, sample): EvalResult(
            task,
            Trajectory(EpisodeId(0, task.task_id, sample), "old", TokenContext(()), (), EpisodeStatus.ANSWERED),
        )
        for task, sample in [(TASKS[0], 0), (TASKS[0], 1), (TASKS[1], 0)]
    }
    for result in logged.values():
        log.append(result)
    episodes, log, progress = await run_two_tasks(path, 2)
    assert sorted((episode.task_id, episode.sample) for episode in episodes) == [("t1", 0), ("t1", 1)]
    assert progress == [1, 1]
    formats = {(r.task.task_id, r.trajectory.id.sample): r.trajectory.chat_format for r in log.records}
    assert formats == {("t0", 0): "old", ("t0", 1): "old", ("t1", 0): "old", ("t1", 1): "wire"}
    assert (await run_two_tasks(path, 2))[0] == []
