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

from vz_ray.data.task_sampler import StepTaskSampler, TaskSampler
from vz_ray.env.task import Task
from vz_ray.monitoring.run_dir import RunDir
from vz_ray.rollout.sample_tracker import SampleTracker
from vz_ray.utils.atomic_files import atomic_directory, write_atomic
from vz_ray.utils.errors import UserError
from vz_ray.utils.step_dirs import list_steps, prune_steps, step_name, write_step_metric

STATE_FILE, LEARNER_DIR = "state.json", "learner"


@dataclass
class TrainingState:
    """What a run goes on from, besides the learner's own state.

    Attributes:
        cursor: Which tasks come next.
        sample_tracker: Which samples are owed.
        step: Iterations done.
        weight_version: Version that the engines hold.
        tasks_by_step: Ids of the tasks that each iteration under way has taken from the cursor.
    """

    cursor: TaskSampler
    sample_tracker: SampleTracker = field(default_factory=SampleTracker)
    step: int = 0
    weight_version: int = 0
    tasks_by_step: dict[int, list[str]] = field(default_factory=dict)

    def tasks_for_step(self, step: int) -> StepTaskSampler:
        """Where an iteration gets its tasks from."""
        return StepTaskSampler(self.cursor, self.tasks_by_step.setdefault(step, []))

    def finish_step(self) -> None:
        """Ends the iteration that is next to be done; nothing of it may be owed any more."""
        self.sample_tracker.close_step(self.step)
        self.tasks_by_step.pop(self.step, None)
        self.step += 1

    async def save(
        self,
        run_dir: RunDir,
        save_learner: Callable[[Path], Awaitable[None]],
        keep_latest: int,
        keep_best: int = 0,
        metric: tuple[str, float] | None = None,
    ) -> Path:
        """Writes a checkpoint, deletes all but those that are kept; returns its directory.

        One of this iteration that is there already is left as it is: it leads to the same batches.

        Args:
            keep_latest: How many of the newest are kept.
            keep_best: How many of those with the highest figures are kept besides.
            metric: Name and value of what this one is compared by; None leaves it out of comparison.
        """
        final = run_dir.checkpoints / step_name(self.step)
        if not final.exists():
            content = {
                "step": self.step,
                "weight_version": self.weight_version,
                "cursor": self.cursor.to_dict(),
                "sample_tracker": self.sample_tracker.to_dict(),
                "tasks_by_step": [[iteration, ids] for iteration, ids in self.tasks_by_step.items()],
            }
            with atomic_directory(final) as partial:
                await save_learner(partial / LEARNER_DIR)
                write_atomic(partial / STATE_FILE, json.dumps(content).encode())
                if metric is not None:
                    write_step_metric(partial, *metric)
        prune_steps(run_dir.checkpoints, keep_latest, keep_best)
        return final

    @classmethod
    def load(cls, checkpoint: Path, tasks: Sequence[Task]) -> TrainingState:
        """Reads a checkpoint of a run over `tasks`.

        Iterations that were under way are played again, with the tasks that they had taken.

        Raises:
            UserError: It was written for another number of tasks.
        """
        content = json.loads((checkpoint / STATE_FILE).read_text())
        cursor = TaskSampler.from_dict(content["cursor"], tasks)
        ledger = SampleTracker.from_dict(content["sample_tracker"])
        ledger.reopen(content["step"])
        taken = {iteration: list(ids) for iteration, ids in content["tasks_by_step"]}
        return cls(cursor, ledger, content["step"], content["weight_version"], taken)


def delete_outputs_from(run: RunDir, step: int) -> None:
    """Deletes what iterations from `step` on left in a run that goes on from before them.

    They are played again; their old episodes and validations must not stand beside the new ones.
    """
    for path in run.episodes.glob("*.jsonl"):
        if int(path.stem) >= step:
            path.unlink()
    for path in (run.path / "validation").glob("*.jsonl"):
        if int(path.stem) > step:
            path.unlink()


def list_checkpoints(run: RunDir) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return list_steps(run.checkpoints)


def latest_checkpoint(run: RunDir) -> Path | None:
    """The newest complete checkpoint, if there is one.

    Raises:
        UserError: It lacks its parts: someone has been deleting files.
    """
    found = list_checkpoints(run)
    if not found:
        return None
    for part in (STATE_FILE, LEARNER_DIR):
        if not (found[-1] / part).exists():
            raise UserError(f"checkpoint {found[-1]} has no {part}: delete it to go on from the one before")
    return found[-1]
