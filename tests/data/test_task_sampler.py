"""Task sampler: every task once per epoch, and the same tasks after a resume."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from vz_ray.data.task_sampler import StepTaskSampler, TaskSampler
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


def test_uninformative_tasks_are_skipped_and_come_back() -> None:
    """v of t0 is 1/4 after two uninformative groups, so that it is skipped with probability 0.8 * 3/4 = 0.6."""
    sampler = TaskSampler(TASKS, seed=2, max_skip_rate=0.8)
    sampler.record({"t0": False, "t1": True})
    sampler.record({"t0": False})
    assert sampler.skip_rate == pytest.approx(0.8 * 0.75 / 10)
    drawn = Counter(task.task_id for task in sampler.next_tasks(4000))
    epochs = sampler.epoch
    assert drawn["t0"] / epochs == pytest.approx(0.4, abs=0.1)
    assert {drawn[f"t{i}"] for i in range(1, 10)} <= {int(epochs), int(epochs) + 1}

    for _ in range(20):
        sampler.record({"t0": True})
    assert sampler.skip_rate == pytest.approx(0.0, abs=1e-6)


def test_resumed_sampler_keeps_the_informative_rates() -> None:
    sampler = TaskSampler(TASKS, seed=3, max_skip_rate=0.9)
    sampler.record({f"t{i}": i % 2 == 0 for i in range(10)})
    content = json.loads(json.dumps(sampler.to_dict()))
    resumed = TaskSampler.from_dict(content, TASKS, max_skip_rate=0.9)
    assert resumed.next_tasks(30) == sampler.next_tasks(30)
    del content["informative_rates"]  # a checkpoint of an earlier version
    assert TaskSampler.from_dict(content, TASKS, max_skip_rate=0.9).skip_rate == 0


def test_step_draws_every_task_once_although_all_are_skipped_often() -> None:
    sampler = TaskSampler(TASKS, seed=5, max_skip_rate=0.95)
    for _ in range(50):
        sampler.record(dict.fromkeys((task.task_id for task in TASKS), False))
    drawn_ids: list[str] = []
    tasks = StepTaskSampler(sampler, drawn_ids).next_tasks(10)
    assert sorted(drawn_ids) == sorted(task.task_id for task in tasks) == sorted(task.task_id for task in TASKS)


def test_sampler_rejects_another_number_of_tasks():
    with pytest.raises(UserError, match="the data file has 9 tasks, and the run started with 10"):
        TaskSampler.from_dict(TaskSampler(TASKS).to_dict(), TASKS[:9])
