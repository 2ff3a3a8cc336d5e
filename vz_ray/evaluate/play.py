"""Plays an evaluation through the training fleet: greedy, resumable, one line per question."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from vz_ray.config.episode import EpisodeConfig
from vz_ray.data.task import Task
from vz_ray.episode.trajectory import Sampling
from vz_ray.evaluate.results import EvalLog, EvalResult
from vz_ray.rollout.fleet import Fleet
from vz_ray.rollout.ledger import Ledger

GREEDY = Sampling(temperature=0.0)


async def evaluate(
    fleet: Fleet,
    tasks: Sequence[Task],
    log: EvalLog,
    episode: EpisodeConfig,
    *,
    stage: str,
    step: int = 0,
    samples: int = 1,
    sampling: Sampling = GREEDY,
    advance: Callable[[int], None] = lambda _: None,
) -> list[EvalResult]:
    """Plays the tasks that `log` does not hold yet; returns all results, the old ones first.

    Args:
        fleet: Engines with the weights to be evaluated.
        tasks: What to play.
        log: Where results go, each as soon as it is there.
        episode: What an episode may do.
        stage: Name of the evaluation.
        step: Training iteration of the weights.
        samples: Episodes of each task; one that lacks some is played again, and what the log has stays.
        sampling: How they are drawn; greedily, unless there are to be several.
        advance: Called with the number of questions done since the last call.
    """
    done = log.done
    left = [task for task in tasks if any((task.task_id, k) not in done for k in range(samples))]
    advance(len(tasks) - len(left))
    ledger = Ledger()
    games = [
        asyncio.create_task(
            fleet.play_group(task, samples, sampling, ledger, iteration=step, episode=episode)
        )
        for task in left
    ]
    tasks_by_id = {task.task_id: task for task in left}
    try:
        for game in asyncio.as_completed(games):
            group = await game
            for trajectory in group.trajectories:
                if (group.task, trajectory.id.sample) not in done:
                    log.append(EvalResult(tasks_by_id[group.task], trajectory, stage, step))
            advance(1)
    finally:
        for unfinished in games:
            unfinished.cancel()
    return log.records
