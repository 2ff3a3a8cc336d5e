"""`vz-ray export`: a run's checkpoint as an ordinary HF directory, without a GPU and without its ranks."""

from __future__ import annotations

from pathlib import Path

from vz_ray.learner.checkpoint_files import MANIFEST
from vz_ray.learner.export import export_checkpoint
from vz_ray.training.state import LEARNER_DIR
from vz_ray.utils.errors import UserError
from vz_ray.utils.step_dirs import list_steps, read_step_metric


def run_export(source: Path, out: Path, base: Path | None = None, *, best: bool = False) -> Path:
    """Exports the checkpoint that `source` leads to (see `checkpoint_of`); returns where that is.

    Raises:
        UserError: `source` leads to none, `out` is there already, or see `export_checkpoint`.
    """
    if out.exists():
        raise UserError(f"{out} exists, and is never written over: choose another directory")
    checkpoint = resolve_checkpoint(source, best=best)
    export_checkpoint(checkpoint, out, base)
    return checkpoint


def resolve_checkpoint(source: Path, *, best: bool = False) -> Path:
    """The learner's part of a checkpoint.

    Args:
        source: A run directory, for its newest checkpoint; a directory of checkpoints; a checkpoint; or the
            learner's part of one. A run of several stages has those of reinforcement learning before those
            of a supervised stage.
        best: Takes the checkpoint with the highest figure rather than the newest.

    Raises:
        UserError: There is none, or it is not clear which.
    """
    if (source / MANIFEST).is_file():
        return source
    if (source / LEARNER_DIR).is_dir():
        return source / LEARNER_DIR
    return _chosen(_steps(source), source, best) / LEARNER_DIR


def _steps(source: Path) -> list[Path]:
    """The checkpoints below a directory, oldest first."""
    folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    if found := list_steps(folder):
        return found
    stages = {stage: list_steps(stage) for stage in sorted(folder.glob("*")) if stage.is_dir()}
    stages = {stage: found for stage, found in stages.items() if found}
    if len(stages) > 1:
        raise UserError(
            f"{source} has checkpoints of several stages, give one: {', '.join(map(str, stages))}"
        )
    return next(iter(stages.values()), [])


def _chosen(steps: list[Path], source: Path, best: bool) -> Path:
    if not steps:
        raise UserError(f"no complete checkpoint at {source}: give a run directory or a checkpoint")
    if not best:
        return steps[-1]
    figures = {step: figure for step in steps if (figure := read_step_metric(step)) is not None}
    if not figures:
        raise UserError(f"no checkpoint of {source} has a figure to be compared by: set train.keep_best")
    return max(reversed(figures), key=lambda step: figures[step])
