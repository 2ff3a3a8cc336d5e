"""Resumable task sampling: a resumed run draws the tasks that the interrupted run would have drawn."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from vz_ray.env.task import Task
from vz_ray.utils.errors import UserError


@dataclass
class TaskSampler:
    """Draws tasks epoch by epoch, each epoch in another random order.

    A task is skipped in an epoch with probability `max_skip_rate` (1 - v). v estimates how often its groups are
    informative: it starts at 1, and becomes (v + 1) / 2 after an informative group and v / 2 after another. A task that
    became too easy or stayed too hard is thus drawn less often, and again as soon as its groups are informative.

    Attributes:
        tasks: All tasks of the run.
        seed: Seed of the orders.
        max_skip_rate: Maximum probability to skip a task, below 1.
        num_drawn: Number of tasks drawn or skipped so far, over all epochs.
        informative_rates: v of the tasks whose v is below 1, by task id.
    """

    tasks: Sequence[Task]
    seed: int = 0
    max_skip_rate: float = 0.0
    num_drawn: int = 0
    informative_rates: dict[str, float] = field(default_factory=dict)

    def next_tasks(self, count: int) -> list[Task]:
        """Draw `count` tasks; they may span several epochs."""
        batch: list[Task] = []
        while len(batch) < count:
            epoch, position = divmod(self.num_drawn, len(self.tasks))
            task = self.tasks[self._order(epoch)[position]]
            self.num_drawn += 1
            if random.Random(f"{self.seed}/{epoch}/{task.task_id}").random() >= self._skip_rate_of(task):
                batch.append(task)
        return batch

    def record(self, informative: Mapping[str, bool]) -> None:
        """Record whether the groups of some tasks were informative, by task id."""
        for task_id, value in informative.items():
            self.informative_rates[task_id] = (self.informative_rates.get(task_id, 1.0) + value) / 2

    @property
    def skip_rate(self) -> float:
        """Mean probability of a task to be skipped."""
        return self.max_skip_rate * sum(1 - rate for rate in self.informative_rates.values()) / len(self.tasks)

    def _skip_rate_of(self, task: Task) -> float:
        return self.max_skip_rate * (1 - self.informative_rates.get(task.task_id, 1.0))

    @property
    def epoch(self) -> float:
        """Number of completed epochs, with fraction; skipped tasks count."""
        return self.num_drawn / len(self.tasks)

    def to_dict(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "num_drawn": self.num_drawn,
            "tasks": len(self.tasks),
            "informative_rates": self.informative_rates,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], tasks: Sequence[Task], max_skip_rate: float = 0.0) -> TaskSampler:
        """Restore a sampler over the same tasks.

        Raises:
            UserError: The number of tasks has changed.
        """
        if content["tasks"] != len(tasks):
            raise UserError(
                f"the data file has {len(tasks)} tasks, and the run started with {content['tasks']}; "
                "restore the file or start another run"
            )
        # Checkpoints of earlier versions have no rates.
        rates = dict(content.get("informative_rates", {}))
        return cls(tasks, content["seed"], max_skip_rate, content["num_drawn"], rates)

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
        return _shuffled(len(self.tasks), f"{self.seed}/{epoch}")


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
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
