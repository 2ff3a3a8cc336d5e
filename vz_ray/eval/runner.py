"""Plays an evaluation through the training fleet: greedy, resumable, one line per question."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from vz_ray.config.episode import EpisodeConfig
from vz_ray.env.task import Task
from vz_ray.env.trajectory import SamplingParams
from vz_ray.eval.eval_log import EvalLog, EvalResult
from vz_ray.rollout.rollout_scheduler import RolloutScheduler
from vz_ray.rollout.sample_tracker import SampleTracker

GREEDY_SAMPLING = SamplingParams(temperature=0.0)


async def evaluate(
    fleet: RolloutScheduler,
    tasks: Sequence[Task],
    log: EvalLog,
    episode: EpisodeConfig,
    *,
    stage: str,
    step: int = 0,
    samples_per_task: int = 1,
    sampling_params: SamplingParams = GREEDY_SAMPLING,
    on_progress: Callable[[int], None] = lambda _: None,
) -> list[EvalResult]:
    """Plays the tasks that `log` does not hold yet; returns all results, the old ones first.

    Args:
        fleet: Engines with the weights to be evaluated.
        tasks: What to play.
        log: Where results go, each as soon as it is there.
        episode: What an episode may do.
        stage: Name of the evaluation.
        step: Training iteration of the weights.
        samples_per_task: Episodes of each task; one that lacks some is played again, and what the log has stays.
        sampling_params: How they are drawn; greedily, unless there are to be several.
        on_progress: Called with the number of questions done since the last call.
    """
    done = log.completed
    left = [task for task in tasks if any((task.task_id, k) not in done for k in range(samples_per_task))]
    on_progress(len(tasks) - len(left))
    ledger = SampleTracker()
    games = [
        asyncio.create_task(
            fleet.rollout_group(
                task, samples_per_task, sampling_params, ledger, step=step, episode_config=episode
            )
        )
        for task in left
    ]
    tasks_by_id = {task.task_id: task for task in left}
    try:
        for game in asyncio.as_completed(games):
            group = await game
            for trajectory in group.trajectories:
                if (group.task_id, trajectory.id.sample) not in done:
                    log.append(EvalResult(tasks_by_id[group.task_id], trajectory, stage, step))
            on_progress(1)
    finally:
        for unfinished in games:
            unfinished.cancel()
    return log.records
