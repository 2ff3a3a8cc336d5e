"""Task sampler: every task once per epoch, and the same tasks after a resume."""

from __future__ import annotations

import pytest

from vz_ray.data.task_sampler import TaskSampler
from vz_ray.env.task import Task
from vz_ray.utils.errors import UserError

TASKS = [Task(f"t{i}", "v.mp4", "q", "a") for i in range(10)]


def test_each_epoch_has_every_task_in_another_order():
    sampler = TaskSampler(TASKS, seed=1)
    first = [t.task_id for t in sampler.next_tasks(7) + sampler.next_tasks(3)]
    second = [t.task_id for t in sampler.next_tasks(10)]
    assert sorted(first) == sorted(second) == sorted(t.task_id for t in TASKS)
    assert first != second


def test_resumed_sampler_continues_the_sequence():
    sampler = TaskSampler(TASKS, seed=4)
    sampler.next_tasks(13)
    resumed = TaskSampler.from_dict(sampler.to_dict(), TASKS)
    assert resumed.next_tasks(9) == sampler.next_tasks(9)
    assert resumed.epoch == 2.2


def test_sampler_rejects_another_number_of_tasks():
    with pytest.raises(UserError, match="the data file has 9 tasks, and the run started with 10"):
        TaskSampler.from_dict(TaskSampler(TASKS).to_dict(), TASKS[:9])
