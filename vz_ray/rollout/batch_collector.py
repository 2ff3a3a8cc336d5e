"""Collect one training batch with dynamic sampling."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from vz_ray.config.episode import EpisodeConfig
from vz_ray.data.task_sampler import StepTaskSampler
from vz_ray.env.task import Task
from vz_ray.env.trajectory import Group, SamplingParams
from vz_ray.rollout.rollout_scheduler import RolloutScheduler
from vz_ray.rollout.sample_tracker import SampleTracker


@dataclass
class RolloutBatch:
    """Groups of one step.

    Attributes:
        kept: Groups to train on, in completion order.
        sampled: All groups with their tasks, including dropped groups.
    """

    kept: list[Group] = field(default_factory=list)
    sampled: list[tuple[Task, Group]] = field(default_factory=list)

    @property
    def informative(self) -> dict[str, bool]:
        """Whether the group of each task is kept, by task id; without groups that a failure made invalid."""
        kept = {group.task_id for group in self.kept}
        return {
            task.task_id: task.task_id in kept
            for task, group in self.sampled
            if all(trajectory.reward is not None and trajectory.reward.valid for trajectory in group.trajectories)
        }


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
    score: Callable[[Group], Awaitable[Group | None]] | None = None,
    extra_samples: int = 0,
    episode_config: Callable[[Task], EpisodeConfig | None] = lambda _: None,
) -> RolloutBatch:
    """Sample tasks until `batch_size` groups are kept or `max_sampled_tasks` tasks are used.

    A dropped group is replaced at once by the next task, so that engines do not idle.

    Args:
        scheduler: Runs the groups.
        task_source: Tasks of this step.
        tracker: Registers every sample.
        step: Training step of the episode ids.
        batch_size: Groups to keep.
        max_sampled_tasks: Maximum number of groups to sample.
        group_size: Trajectories per group.
        sampling: Sampling parameters.
        keep: Return whether a group is informative.
        score: Return a kept group with the log-probs of a teacher, while others are rolled out; None drops it.
        extra_samples: See `RolloutScheduler.rollout_group`.
        episode_config: Return the episode config of a task; None is that of the workers.
    """
    batch, running = RolloutBatch(), set[asyncio.Task[tuple[Task, Group, bool]]]()

    async def rollout(task: Task) -> tuple[Task, Group, bool]:
        group = await scheduler.rollout_group(
            task,
            group_size,
            sampling,
            tracker,
            step=step,
            episode_config=episode_config(task),
            extra_samples=extra_samples,
        )
        if not keep(group):
            return task, group, False
        scored = await score(group) if score is not None else group
        return task, scored or group, scored is not None

    def refill() -> None:
        missing = batch_size - len(batch.kept) - len(running)
        available = min(max_sampled_tasks, task_source.num_tasks) - task_source.num_drawn
        for task in task_source.next_tasks(max(0, min(missing, available))):
            running.add(asyncio.create_task(rollout(task)))

    try:
        refill()
        while running:
            done, pending = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            running.clear()
            running.update(pending)
            for finished in done:
                task, group, kept = finished.result()
                batch.sampled.append((task, group))
                if kept:
                    batch.kept.append(group)
            refill()
    finally:
        for unfinished in running:
            unfinished.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return batch
