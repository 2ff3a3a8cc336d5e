"""Fills a batch with groups worth learning from: dynamic sampling, while others still play."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from vz_ray.data.task_sampler import StepTaskSampler
from vz_ray.env.task import Task
from vz_ray.env.trajectory import Group, SamplingParams
from vz_ray.rollout.rollout_scheduler import RolloutScheduler
from vz_ray.rollout.sample_tracker import SampleTracker


@dataclass
class RolloutBatch:
    """One iteration's groups.

    Attributes:
        kept: Groups to learn from, in the order in which they finished.
        sampled: Every group with its task, those dropped too.
    """

    kept: list[Group] = field(default_factory=list)
    sampled: list[tuple[Task, Group]] = field(default_factory=list)


async def collect_batch(
    scheduler: RolloutScheduler,
    task_source: StepTaskSampler,
    tracker: SampleTracker,
    *,
    step: int,
    batch_size: int,
    max_sampled_tasks: int,
    group_size: int,
    sampling: SamplingParams,
    keep: Callable[[Group], bool],
    extra_samples: int = 0,
    on_group_kept: Callable[[int], None] = lambda _: None,
) -> RolloutBatch:
    """Plays tasks until `batch_size` groups are kept, or `max_sampled_tasks` have been played.

    A group that is dropped is replaced by the next task at once, so that
    engines do not wait for the slowest group of a round.

    Args:
        scheduler: Who plays.
        task_source: Where tasks come from.
        tracker: Keeps account of every sample.
        step: Names the episodes.
        batch_size: Groups to keep.
        max_sampled_tasks: Most groups to play.
        group_size: Trajectories in a group.
        sampling: How they are drawn.
        keep: Whether a group is worth learning from.
        extra_samples: Further samples of each group; see `RolloutScheduler.play_group`.
        on_group_kept: Called with the number of groups kept since the last call.
    """
    batch, playing = RolloutBatch(), set[asyncio.Task[tuple[Task, Group]]]()

    def refill() -> None:
        wanted = min(
            batch_size - len(batch.kept) - len(playing),
            min(max_sampled_tasks, task_source.num_tasks) - task_source.num_drawn,
        )
        for task in task_source.next_tasks(max(0, wanted)):
            playing.add(
                asyncio.create_task(
                    _play(scheduler, task, group_size, extra_samples, sampling, tracker, step)
                )
            )

    try:
        refill()
        while playing:
            done, left = await asyncio.wait(playing, return_when=asyncio.FIRST_COMPLETED)
            playing.clear()
            playing.update(left)
            for finished in done:
                task, group = finished.result()
                batch.sampled.append((task, group))
                if keep(group):
                    batch.kept.append(group)
                    on_group_kept(1)
            refill()
    finally:
        for unfinished in playing:
            unfinished.cancel()
        await asyncio.gather(*playing, return_exceptions=True)
    return batch


async def _play(
    fleet: RolloutScheduler,
    task: Task,
    samples: int,
    spare: int,
    sampling: SamplingParams,
    ledger: SampleTracker,
    iteration: int,
) -> tuple[Task, Group]:
    group = await fleet.rollout_group(task, samples, sampling, ledger, step=iteration, extra_samples=spare)
    return task, group
