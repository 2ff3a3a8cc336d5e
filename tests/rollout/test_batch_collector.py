"""Dynamic sampling: dropped groups are replaced at once, and every task is used once."""

from __future__ import annotations

import asyncio

import pytest

from vz_ray.config.episode import EpisodeConfig
from vz_ray.data.task_sampler import StepTaskSampler, TaskSampler
from vz_ray.env.task import Task
from vz_ray.env.trajectory import (
    EpisodeId,
    EpisodeStatus,
    Group,
    RewardParts,
    SamplingParams,
    TokenContext,
    Trajectory,
)
from vz_ray.rollout.batch_collector import collect_batch
from vz_ray.rollout.sample_tracker import SampleTracker

INVALID_TASK = "t1"
"""Task whose samples have invalid rewards."""
TASKS = [Task(f"t{i}", "v.mp4", "q", "a") for i in range(12)]


class FakeScheduler:
    """Complete groups at once; record the maximum number of concurrent groups, and their episode configs."""

    def __init__(self) -> None:
        self.running, self.max_running = 0, 0
        self.episode_configs: dict[str, EpisodeConfig | None] = {}

    async def rollout_group(self, task, group_size, sampling_params, tracker, *, step, episode_config, extra_samples):
        self.episode_configs[task.task_id] = episode_config
        self.running += 1
        self.max_running = max(self.max_running, self.running)
        await asyncio.sleep(0)
        ids = tracker.register(step, task.task_id, group_size)
        for id in ids:
            tracker.accept(id)
        self.running -= 1
        reward = RewardParts(0, 0, 0, 0, valid=task.task_id != INVALID_TASK)
        return Group(
            task.task_id,
            tuple(Trajectory(id, "", TokenContext(()), (), EpisodeStatus.ANSWERED, reward=reward) for id in ids),
        )


async def collect(keep, sampler, **overrides):
    scheduler, tracker = FakeScheduler(), SampleTracker()
    sizes = {"batch_size": 4, "max_sampled_tasks": 10, "group_size": 2, **overrides}
    batch = await collect_batch(
        scheduler,
        StepTaskSampler(sampler, []),
        tracker,
        step=0,
        sampling=SamplingParams(),
        keep=keep,
        **sizes,
    )
    return batch, scheduler, tracker


async def test_dropped_groups_are_replaced_until_batch_is_full():
    sampler = TaskSampler(TASKS)
    batch, scheduler, tracker = await collect(lambda group: int(group.task_id[1:]) % 2 == 0, sampler)
    assert len(batch.kept) == 4
    assert len(batch.sampled) == sampler.num_drawn == len({task.task_id for task, _ in batch.sampled})
    assert scheduler.max_running <= 4
    assert tracker.pending == ()


async def test_collection_stops_at_max_sampled_tasks():
    batch, _, _ = await collect(lambda group: False, TaskSampler(TASKS))
    assert (len(batch.kept), len(batch.sampled)) == (0, 10)


async def test_outcomes_of_groups_with_invalid_rewards_are_unknown():
    batch, _, _ = await collect(lambda group: group.task_id == "t2", TaskSampler(TASKS), batch_size=12)
    sampled = {task.task_id for task, _ in batch.sampled}
    assert INVALID_TASK in sampled
    assert batch.informative == {task_id: task_id == "t2" for task_id in sampled - {INVALID_TASK}}


async def test_each_task_has_its_episode_config():
    batch, scheduler, _ = await collect(
        lambda group: True,
        TaskSampler(TASKS),
        episode_config=lambda task: EpisodeConfig(overview_frames=int(task.task_id[1:]) + 1),
    )
    expected = {task.task_id: int(task.task_id[1:]) + 1 for task, _ in batch.sampled}
    assert {task_id: config.overview_frames for task_id, config in scheduler.episode_configs.items()} == expected


async def test_epoch_change_within_a_step_repeats_no_task():
    sampler = TaskSampler(TASKS, num_drawn=9)
    batch, _, _ = await collect(lambda group: True, sampler, batch_size=12, max_sampled_tasks=50)
    assert len({task.task_id for task, _ in batch.sampled}) == 12


async def test_failure_cancels_running_groups():
    class FailingScheduler(FakeScheduler):
        async def rollout_group(self, task, *args, **kwargs):
            if task.task_id == "t3":
                raise RuntimeError("no worker")
            await asyncio.sleep(3600)

    with pytest.raises(RuntimeError, match="no worker"):
        await collect_batch(
            FailingScheduler(),
            StepTaskSampler(TaskSampler(TASKS), []),
            SampleTracker(),
            step=0,
            batch_size=12,
            max_sampled_tasks=12,
            group_size=1,
            sampling=SamplingParams(),
            keep=lambda group: True,
        )
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


def test_episode_id_has_a_readable_format():
    assert str(EpisodeId(3, "t1", 2, 1)) == "3/t1/2#1"


async def test_kept_groups_are_scored_while_others_run_and_replaced_without_a_score():
    running_while_scoring = []

    async def score(group):
        running_while_scoring.append(scheduler.running)
        if group.task_id == "t0":
            return None
        return Group(f"scored {group.task_id}", group.trajectories)

    scheduler, tracker = FakeScheduler(), SampleTracker()
    batch = await collect_batch(
        scheduler,
        StepTaskSampler(TaskSampler(TASKS), []),
        tracker,
        step=0,
        batch_size=4,
        max_sampled_tasks=10,
        group_size=2,
        sampling=SamplingParams(),
        keep=lambda group: group.task_id != "t1",
        score=score,
    )
    sampled = {task.task_id: group.task_id for task, group in batch.sampled}
    kept = {group.task_id for group in batch.kept}
    assert len(batch.kept) == 4
    assert kept == {name for name in sampled.values() if name.startswith("scored")}
    assert all(name == task for task, name in sampled.items() if task in ("t0", "t1"))
    assert len(running_while_scoring) == len(sampled) - ("t1" in sampled)
    assert max(running_while_scoring) > 0
