"""Resumable task sampling: a resumed run draws the tasks that the interrupted run would have drawn."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vz_ray.env.task import Task
from vz_ray.utils.errors import UserError


@dataclass
class TaskSampler:
    """Draws tasks epoch by epoch, each epoch in another random order.

    Attributes:
        tasks: All tasks of the run.
        seed: Seed of the orders.
        num_drawn: Number of tasks drawn so far, over all epochs.
    """

    tasks: Sequence[Task]
    seed: int = 0
    num_drawn: int = 0

    def next_tasks(self, count: int) -> list[Task]:
        """Draw `count` tasks; they may span two epochs."""
        batch = []
        for index in range(self.num_drawn, self.num_drawn + count):
            epoch, position = divmod(index, len(self.tasks))
            batch.append(self.tasks[self._order(epoch)[position]])
        self.num_drawn += count
        return batch

    @property
    def epoch(self) -> float:
        """Number of completed epochs, with fraction."""
        return self.num_drawn / len(self.tasks)

    def to_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "num_drawn": self.num_drawn, "tasks": len(self.tasks)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], tasks: Sequence[Task]) -> TaskSampler:
        """Restore a sampler over the same tasks.

        Raises:
            UserError: The number of tasks has changed.
        """
        if content["tasks"] != len(tasks):
            raise UserError(
                f"the data file has {len(tasks)} tasks, and the run started with {content['tasks']}; "
                "restore the file or start another run"
            )
        return cls(tasks, content["seed"], content["num_drawn"])

    def tasks_by_id(self, ids: Sequence[str]) -> list[Task]:
        """Return the tasks with these ids, in the given order.

        Raises:
            UserError: An id is missing from the data file.
        """
        by_id = {task.task_id: task for task in self.tasks}
        if missing := [task_id for task_id in ids if task_id not in by_id]:
            raise UserError(
                f"the data file no longer contains task {missing[0]}; restore the file or start another run"
            )
        return [by_id[task_id] for task_id in ids]

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.tasks)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order


class StepTaskSampler:
    """Draws distinct tasks for one training step; after a restart, the tasks drawn before come first.

    Args:
        sampler: Source of further tasks, shared by concurrent steps.
        drawn_ids: Ids of all tasks drawn for the step, in order. Extended in place; part of the
            checkpoint.
    """

    def __init__(self, sampler: TaskSampler, drawn_ids: list[str]) -> None:
        self._sampler, self._drawn_ids = sampler, drawn_ids
        self._replayed = sampler.tasks_by_id(drawn_ids)
        self.num_drawn = 0

    @property
    def num_tasks(self) -> int:
        """Number of distinct tasks."""
        return len(self._sampler.tasks)

    def next_tasks(self, count: int) -> list[Task]:
        """Draw `count` tasks; tasks repeated by a new epoch are skipped."""
        batch = [self._replayed.pop(0) if self._replayed else self._draw_new() for _ in range(count)]
        self.num_drawn += count
        return batch

    def _draw_new(self) -> Task:
        while True:
            (task,) = self._sampler.next_tasks(1)
            if task.task_id not in self._drawn_ids:
                self._drawn_ids.append(task.task_id)
                return task
