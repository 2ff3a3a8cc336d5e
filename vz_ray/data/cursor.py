"""Where in the task list a run is; the next batch after a resume is the one that would have come."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vz_ray.data.task import Task
from vz_ray.observe.errors import UserError


@dataclass
class TaskCursor:
    """Walks the tasks epoch after epoch, each in an order of its own drawn from `seed`.

    Attributes:
        tasks: All tasks of the run.
        seed: Makes the orders.
        taken: Tasks handed out so far, over all epochs.
    """

    tasks: Sequence[Task]
    seed: int = 0
    taken: int = 0

    def take(self, count: int) -> list[Task]:
        """The next `count` tasks; an epoch's end may lie among them."""
        batch = [
            self.tasks[self._order(at // len(self.tasks))[at % len(self.tasks)]] for at in self._next(count)
        ]
        self.taken += count
        return batch

    @property
    def epoch(self) -> float:
        """Epochs done, with fraction."""
        return self.taken / len(self.tasks)

    def to_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "taken": self.taken, "tasks": len(self.tasks)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], tasks: Sequence[Task]) -> TaskCursor:
        """The cursor as it was, over the same tasks.

        Raises:
            UserError: There are more or fewer of them than there were.
        """
        if content["tasks"] != len(tasks):
            raise UserError(
                f"the run was over {content['tasks']} tasks and the data file now has {len(tasks)}: "
                "restore the file or start another run"
            )
        return cls(tasks, content["seed"], content["taken"])

    def find(self, ids: Sequence[str]) -> list[Task]:
        """The tasks of these ids, in that order.

        Raises:
            UserError: The data file does not have one of them.
        """
        by_id = {task.task_id: task for task in self.tasks}
        if lost := [id for id in ids if id not in by_id]:
            raise UserError(f"the data file has no task {lost[0]} any more: restore it or start another run")
        return [by_id[id] for id in ids]

    def _next(self, count: int) -> range:
        return range(self.taken, self.taken + count)

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.tasks)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order


class IterationTasks:
    """The tasks of one iteration, none twice: first those that it had taken before a restart.

    Args:
        cursor: Where further ones come from; shared by the iterations under way.
        taken: Ids of all that the iteration has taken, in order; grows, and belongs in the checkpoint.
    """

    def __init__(self, cursor: TaskCursor, taken: list[str]) -> None:
        self._cursor, self._taken = cursor, taken
        self._again = cursor.find(taken)
        self.given = 0

    @property
    def all(self) -> int:
        """How many different tasks there are to give."""
        return len(self._cursor.tasks)

    def take(self, count: int) -> list[Task]:
        """`count` further tasks; an epoch that begins in mid-iteration may hold some that were given."""
        batch = [self._again.pop(0) if self._again else self._other() for _ in range(count)]
        self.given += count
        return batch

    def _other(self) -> Task:
        while True:
            (task,) = self._cursor.take(1)
            if task.task_id not in self._taken:
                self._taken.append(task.task_id)
                return task
