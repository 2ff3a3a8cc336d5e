"""Where in the task list a run is; the next batch after a resume is the one that would have come."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vz_ray.env.task import Task
from vz_ray.utils.errors import UserError


@dataclass
class TaskSampler:
    """Walks the tasks epoch after epoch, each in an order of its own drawn from `seed`.

    Attributes:
        tasks: All tasks of the run.
        seed: Makes the orders.
        num_drawn: Tasks handed out so far, over all epochs.
    """

    tasks: Sequence[Task]
    seed: int = 0
    num_drawn: int = 0

    def next_tasks(self, count: int) -> list[Task]:
        """The next `count` tasks; an epoch's end may lie among them."""
        batch = [
            self.tasks[self._order(at // len(self.tasks))[at % len(self.tasks)]] for at in self._next(count)
        ]
        self.num_drawn += count
        return batch

    @property
    def epoch(self) -> float:
        """Epochs done, with fraction."""
        return self.num_drawn / len(self.tasks)

    def to_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "num_drawn": self.num_drawn, "tasks": len(self.tasks)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], tasks: Sequence[Task]) -> TaskSampler:
        """The cursor as it was, over the same tasks.

        Raises:
            UserError: There are more or fewer of them than there were.
        """
        if content["tasks"] != len(tasks):
            raise UserError(
                f"the run was over {content['tasks']} tasks and the data file now has {len(tasks)}: "
                "restore the file or start another run"
            )
        return cls(tasks, content["seed"], content["num_drawn"])

    def tasks_by_id(self, ids: Sequence[str]) -> list[Task]:
        """The tasks of these ids, in that order.

        Raises:
            UserError: The data file does not have one of them.
        """
        by_id = {task.task_id: task for task in self.tasks}
        if lost := [id for id in ids if id not in by_id]:
            raise UserError(f"the data file has no task {lost[0]} any more: restore it or start another run")
        return [by_id[id] for id in ids]

    def _next(self, count: int) -> range:
        return range(self.num_drawn, self.num_drawn + count)

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.tasks)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order


class StepTaskSampler:
    """The tasks of one iteration, none twice: first those that it had taken before a restart.

    Args:
        cursor: Where further ones come from; shared by the iterations under way.
        taken: Ids of all that the iteration has taken, in order; grows, and belongs in the checkpoint.
    """

    def __init__(self, cursor: TaskSampler, taken: list[str]) -> None:
        self._cursor, self._taken = cursor, taken
        self._again = cursor.tasks_by_id(taken)
        self.num_drawn = 0

    @property
    def num_tasks(self) -> int:
        """How many different tasks there are to give."""
        return len(self._cursor.tasks)

    def next_tasks(self, count: int) -> list[Task]:
        """`count` further tasks; an epoch that begins in mid-iteration may hold some that were given."""
        batch = [self._again.pop(0) if self._again else self._other() for _ in range(count)]
        self.num_drawn += count
        return batch

    def _other(self) -> Task:
        while True:
            (task,) = self._cursor.next_tasks(1)
            if task.task_id not in self._taken:
                self._taken.append(task.task_id)
                return task
