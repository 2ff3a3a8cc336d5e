"""State of an RL run, and its checkpoints: learner, task sampler, sample tracker, counters.

`checkpoints/step-000012/` is the state after twelve steps. The directory is written under a temporary name
and renamed when complete, and renamed again before it is deleted: a directory of that name is complete.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
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
    """State of an RL run, besides the learner's own.

    Attributes:
        task_sampler: Yields the next tasks.
        sample_tracker: Pending samples.
        step: Completed steps.
        weight_version: Version on the engines.
        tasks_by_step: Ids of the tasks that each unfinished step has taken from the sampler.
    """

    task_sampler: TaskSampler
    sample_tracker: SampleTracker = field(default_factory=SampleTracker)
    step: int = 0
    weight_version: int = 0
    tasks_by_step: dict[int, list[str]] = field(default_factory=dict)

    def tasks_for_step(self, step: int) -> StepTaskSampler:
        """Return the task source of a step. A retried step yields the tasks that it took before."""
        return StepTaskSampler(self.task_sampler, self.tasks_by_step.setdefault(step, []))

    def finish_step(self, informative: Mapping[str, bool] | None = None) -> None:
        """Finish the current step; none of its samples may be pending.

        Args:
            informative: Whether the group of each task of the step was informative, by task id.
        """
        self.task_sampler.record(informative or {})
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
        """Write a checkpoint, unless the step has one, and prune old checkpoints.

        Args:
            keep_latest: Newest checkpoints to keep.
            keep_best: Best checkpoints to keep in addition.
            metric: Name and value that rank this checkpoint; None excludes it from the ranking.

        Returns:
            Directory of the checkpoint.
        """
        checkpoint = run_dir.checkpoints / step_name(self.step)
        if not checkpoint.exists():
            content = {
                "step": self.step,
                "weight_version": self.weight_version,
                "task_sampler": self.task_sampler.to_dict(),
                "sample_tracker": self.sample_tracker.to_dict(),
                "tasks_by_step": [[step, task_ids] for step, task_ids in self.tasks_by_step.items()],
            }
            with atomic_directory(checkpoint) as partial:
                await save_learner(partial / LEARNER_DIR)
                write_atomic(partial / STATE_FILE, json.dumps(content).encode())
                if metric is not None:
                    write_step_metric(partial, *metric)
        prune_steps(run_dir.checkpoints, keep_latest, keep_best)
        return checkpoint

    @classmethod
    def load(cls, checkpoint: Path, tasks: Sequence[Task], max_skip_rate: float = 0.0) -> TrainingState:
        """Load a checkpoint of a run on `tasks`. Unfinished steps restart with the tasks that they took.

        Raises:
            UserError: The checkpoint has another number of tasks.
        """
        content = json.loads((checkpoint / STATE_FILE).read_text())
        tracker = SampleTracker.from_dict(content["sample_tracker"])
        tracker.reopen(content["step"])
        return cls(
            TaskSampler.from_dict(content["task_sampler"], tasks, max_skip_rate),
            tracker,
            content["step"],
            content["weight_version"],
            {step: list(task_ids) for step, task_ids in content["tasks_by_step"]},
        )


def delete_outputs_from(run_dir: RunDir, step: int) -> None:
    """Delete the episodes and validations of steps from `step` on; a resumed run writes them again."""
    for path in run_dir.episodes.glob("*.jsonl"):
        if int(path.stem) >= step:
            path.unlink()
    for path in (run_dir.path / "validation").glob("*.jsonl"):
        if int(path.stem) > step:
            path.unlink()


def list_checkpoints(run_dir: RunDir) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    return list_steps(run_dir.checkpoints)


def latest_checkpoint(run_dir: RunDir) -> Path | None:
    """Return the newest complete checkpoint, if any.

    Raises:
        UserError: A part of the checkpoint is missing.
    """
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        return None
    for part in (STATE_FILE, LEARNER_DIR):
        if not (checkpoints[-1] / part).exists():
            raise UserError(f"checkpoint {checkpoints[-1]} has no {part}: delete it to resume from the previous one")
    return checkpoints[-1]
