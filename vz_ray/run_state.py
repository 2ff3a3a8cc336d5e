"""A run's checkpoint: learner, task cursor, ledger and counters, complete or absent.

`checkpoints/step-000012/` holds the state after twelve iterations. It is
written under another name and renamed when all of it is on disk, and renamed
again before it is deleted, so a directory of that name is always whole.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vz_ray.data.cursor import IterationTasks, TaskCursor
from vz_ray.data.task import Task
from vz_ray.observe.errors import UserError
from vz_ray.observe.run_dir import RunDir, whole_directory, write_atomic
from vz_ray.observe.steps import retire, step_name, steps_in, write_figure
from vz_ray.rollout.ledger import Ledger

STATE, LEARNER = "state.json", "learner"


@dataclass
class RunState:
    """What a run goes on from, besides the learner's own state.

    Attributes:
        cursor: Which tasks come next.
        ledger: Which samples are owed.
        iteration: Iterations done.
        weight_version: Version that the engines hold.
        taken: Ids of the tasks that each iteration under way has taken from the cursor.
    """

    cursor: TaskCursor
    ledger: Ledger = field(default_factory=Ledger)
    iteration: int = 0
    weight_version: int = 0
    taken: dict[int, list[str]] = field(default_factory=dict)

    def tasks_of(self, iteration: int) -> IterationTasks:
        """Where an iteration gets its tasks from."""
        return IterationTasks(self.cursor, self.taken.setdefault(iteration, []))

    def close(self) -> None:
        """Ends the iteration that is next to be done; nothing of it may be owed any more."""
        self.ledger.close(self.iteration)
        self.taken.pop(self.iteration, None)
        self.iteration += 1

    async def save(
        self,
        run: RunDir,
        save_learner: Callable[[Path], Awaitable[None]],
        keep: int,
        best: int = 0,
        figure: tuple[str, float] | None = None,
    ) -> Path:
        """Writes a checkpoint, deletes all but those that are kept; returns its directory.

        One of this iteration that is there already is left as it is: it leads to the same batches.

        Args:
            keep: How many of the newest are kept.
            best: How many of those with the highest figures are kept besides.
            figure: Name and value of what this one is compared by; None leaves it out of comparison.
        """
        final = run.checkpoints / step_name(self.iteration)
        if not final.exists():
            content = {
                "iteration": self.iteration,
                "weight_version": self.weight_version,
                "cursor": self.cursor.to_dict(),
                "ledger": self.ledger.to_dict(),
                "taken": [[iteration, ids] for iteration, ids in self.taken.items()],
            }
            with whole_directory(final) as partial:
                await save_learner(partial / LEARNER)
                write_atomic(partial / STATE, json.dumps(content).encode())
                if figure is not None:
                    write_figure(partial, *figure)
        retire(run.checkpoints, keep, best)
        return final

    @classmethod
    def load(cls, checkpoint: Path, tasks: Sequence[Task]) -> RunState:
        """Reads a checkpoint of a run over `tasks`.

        Iterations that were under way are played again, with the tasks that they had taken.

        Raises:
            UserError: It was written for another number of tasks.
        """
        content = json.loads((checkpoint / STATE).read_text())
        cursor = TaskCursor.from_dict(content["cursor"], tasks)
        ledger = Ledger.from_dict(content["ledger"])
        ledger.reopen(content["iteration"])
        taken = {iteration: list(ids) for iteration, ids in content["taken"]}
        return cls(cursor, ledger, content["iteration"], content["weight_version"], taken)


def forget_after(run: RunDir, iteration: int) -> None:
    """Deletes what iterations from `iteration` on left in a run that goes on from before them.

    They are played again; their old episodes and validations must not stand beside the new ones.
    """
    for path in run.episodes.glob("*.jsonl"):
        if int(path.stem) >= iteration:
            path.unlink()
    for path in (run.path / "validation").glob("*.jsonl"):
        if int(path.stem) > iteration:
            path.unlink()


def checkpoints(run: RunDir) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return steps_in(run.checkpoints)


def newest(run: RunDir) -> Path | None:
    """The newest complete checkpoint, if there is one.

    Raises:
        UserError: It lacks its parts: someone has been deleting files.
    """
    found = checkpoints(run)
    if not found:
        return None
    for part in (STATE, LEARNER):
        if not (found[-1] / part).exists():
            raise UserError(f"checkpoint {found[-1]} has no {part}: delete it to go on from the one before")
    return found[-1]
