"""Dynamic sampling: the batch fills while others still play, and every task is taken once."""

from __future__ import annotations

import asyncio

import pytest

from vz_ray.data.task_sampler import StepTaskSampler, TaskSampler
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeId, EpisodeStatus, Group, SamplingParams, TokenContext, Trajectory
from vz_ray.rollout.batch_collector import collect_batch
from vz_ray.rollout.sample_tracker import SampleTracker

TASKS = [Task(f"t{i}", "v.mp4", "q", "a") for i in range(12)]


class FakeScheduler:
    """Plays at once, and remembers how many groups were played side by side."""

    def __init__(self) -> None:
        self.playing, self.most = 0, 0

    async def rollout_group(self, task, samples, sampling, ledger, *, iteration, spare):
        self.playing += 1
        self.most = max(self.most, self.playing)
        await asyncio.sleep(0)
        ids = ledger.owe(iteration, task.task_id, samples)
        for id in ids:
            ledger.accept(id)
        self.playing -= 1
        return Group(
            task.task_id,
            tuple(Trajectory(id, "", TokenContext(()), (), EpisodeStatus.ANSWERED) for id in ids),
        )


async def gather(keep, cursor, **wanted):
    players, ledger = FakeScheduler(), SampleTracker()
    wanted = {"tasks": 4, "max_tasks": 10, "samples": 2, **wanted}
    source = StepTaskSampler(cursor, [])
    batch = await collect_batch(
        players, source, ledger, step=0, sampling=SamplingParams(), keep=keep, **wanted
    )
    return batch, players, ledger


async def test_a_dropped_group_is_replaced_until_the_batch_is_full():
    cursor = TaskSampler(TASKS)
    batch, players, ledger = await gather(lambda group: int(group.task[1:]) % 2 == 0, cursor)
    assert len(batch.kept) == 4
    assert len(batch.sampled) == cursor.num_drawn == len({task.task_id for task, _ in batch.sampled})
    assert players.most <= 4
    assert ledger.pending == ()


async def test_it_gives_up_at_the_most_tasks_allowed():
    batch, _, _ = await gather(lambda group: False, TaskSampler(TASKS))
    assert (len(batch.kept), len(batch.sampled)) == (0, 10)


async def test_an_epoch_that_begins_in_mid_iteration_repeats_no_task():
    cursor = TaskSampler(TASKS, num_drawn=9)
    batch, _, _ = await gather(lambda group: True, cursor, tasks=12, max_tasks=50)
    assert len({task.task_id for task, _ in batch.sampled}) == 12


async def test_a_failure_stops_the_rest_and_leaves_no_task_running():
    class Failing(FakeScheduler):
        async def play_group(self, task, *args, **kwargs):
            if task.task_id == "t3":
                raise RuntimeError("no worker")
            await asyncio.sleep(3600)

    with pytest.raises(RuntimeError, match="no worker"):
        await collect_batch(
            Failing(),
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


def test_ids_name_what_is_owed():
    assert str(EpisodeId(3, "t1", 2, 1)) == "3/t1/2#1"
