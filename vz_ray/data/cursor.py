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

    def _next(self, count: int) -> range:
        return range(self.taken, self.taken + count)

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.tasks)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order
