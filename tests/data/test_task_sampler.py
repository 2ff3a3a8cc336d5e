"""Every task once an epoch, and the same next batch after a resume."""

from __future__ import annotations

import pytest

from vz_ray.data.task_sampler import TaskSampler
from vz_ray.env.task import Task
from vz_ray.utils.errors import UserError

TASKS = [Task(f"t{i}", "v.mp4", "q", "a") for i in range(10)]


def test_each_epoch_holds_every_task_once_in_an_order_of_its_own():
    cursor = TaskSampler(TASKS, seed=1)
    first = [t.task_id for t in cursor.next_tasks(7) + cursor.next_tasks(3)]
    second = [t.task_id for t in cursor.next_tasks(10)]
    assert sorted(first) == sorted(second) == sorted(t.task_id for t in TASKS)
    assert first != second


def test_a_resumed_cursor_hands_out_what_would_have_come():
    cursor = TaskSampler(TASKS, seed=4)
    cursor.next_tasks(13)
    resumed = TaskSampler.from_dict(cursor.to_dict(), TASKS)
    assert resumed.next_tasks(9) == cursor.next_tasks(9)
    assert resumed.epoch == 2.2


def test_a_cursor_over_other_tasks_is_refused():
    with pytest.raises(UserError, match="was over 10 tasks and the data file now has 9"):
        TaskSampler.from_dict(TaskSampler(TASKS).to_dict(), TASKS[:9])
