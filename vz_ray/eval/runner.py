"""Resumable evaluation on the rollout workers, with greedy sampling by default."""

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
    scheduler: RolloutScheduler,
    tasks: Sequence[Task],
    log: EvalLog,
    episode_config: EpisodeConfig,
    *,
    stage: str,
    step: int = 0,
    samples_per_task: int = 1,
    sampling_params: SamplingParams = GREEDY_SAMPLING,
    on_progress: Callable[[int], None] = lambda _: None,
) -> list[EvalResult]:
    """Run the tasks that are missing in `log` and return all results, logged ones first.

    Args:
        scheduler: Its workers hold the weights to evaluate.
        tasks: Tasks to run.
        log: Receives each result as soon as its group is complete.
        episode_config: Limits and prompt of an episode.
        stage: Name of the evaluation.
        step: Training step of the weights.
        samples_per_task: Episodes per task. A task with missing samples reruns; logged samples are kept.
        sampling_params: Sampling parameters of a turn.
        on_progress: Callback that receives the number of tasks completed since the last call.
    """
    completed = log.completed
    open_tasks = {
        task.task_id: task
        for task in tasks
        if any((task.task_id, sample) not in completed for sample in range(samples_per_task))
    }
    on_progress(len(tasks) - len(open_tasks))
    tracker = SampleTracker()
    rollouts = [
        asyncio.create_task(
            scheduler.rollout_group(
                task, samples_per_task, sampling_params, tracker, step=step, episode_config=episode_config
            )
        )
        for task in open_tasks.values()
    ]
    try:
        for rollout in asyncio.as_completed(rollouts):
            group = await rollout
            for trajectory in group.trajectories:
                if (group.task_id, trajectory.id.sample) not in completed:
                    log.append(EvalResult(open_tasks[group.task_id], trajectory, stage, step))
            on_progress(1)
    finally:
        for rollout_task in rollouts:
            rollout_task.cancel()
    return log.records
