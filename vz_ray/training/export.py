"""Export a checkpoint as a Hugging Face model directory (`vz-ray export`); requires no GPU."""

from __future__ import annotations

from pathlib import Path

from vz_ray.learner.checkpoint_files import MANIFEST
from vz_ray.learner.export import export_checkpoint
from vz_ray.training.state import LEARNER_DIR
from vz_ray.utils.errors import UserError
from vz_ray.utils.step_dirs import list_steps, read_step_metric


def run_export(source: Path, out: Path, base: Path | None = None, *, best: bool = False) -> Path:
    """Export the checkpoint that `resolve_checkpoint` finds for `source`, and return its directory.

    Raises:
        UserError: `source` has no checkpoint, `out` exists, or the export fails; see `export_checkpoint`.
    """
    if out.exists():
        raise UserError(f"{out} exists and is not overwritten: choose another directory")
    checkpoint = resolve_checkpoint(source, best=best)
    export_checkpoint(checkpoint, out, base)
    return checkpoint


def resolve_checkpoint(source: Path, *, best: bool = False) -> Path:
    """Return the learner's directory of a checkpoint.

    Args:
        source: A run directory, a directory of checkpoints, a checkpoint, or its learner directory. In a run
            with several stages, checkpoints of RL training precede those of SFT stages.
        best: Choose the checkpoint with the highest metric instead of the newest.

    Raises:
        UserError: No checkpoint exists, or several stages have one.
    """
    if (source / MANIFEST).is_file():
        return source
    if (source / LEARNER_DIR).is_dir():
        return source / LEARNER_DIR
    return _select_checkpoint(_list_checkpoints(source), source, best) / LEARNER_DIR


def _list_checkpoints(source: Path) -> list[Path]:
    """Return the checkpoints in a directory, oldest first."""
    directory = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    if checkpoints := list_steps(directory):
        return checkpoints
    by_stage = {stage: list_steps(stage) for stage in sorted(directory.glob("*")) if stage.is_dir()}
    by_stage = {stage: checkpoints for stage, checkpoints in by_stage.items() if checkpoints}
    if len(by_stage) > 1:
        raise UserError(f"{source} has checkpoints of several stages; choose one: {', '.join(map(str, by_stage))}")
    return next(iter(by_stage.values()), [])


def _select_checkpoint(checkpoints: list[Path], source: Path, best: bool) -> Path:
    if not checkpoints:
        raise UserError(f"{source} has no complete checkpoint: choose a run directory or a checkpoint")
    if not best:
        return checkpoints[-1]
    metrics = {path: metric for path in checkpoints if (metric := read_step_metric(path)) is not None}
    if not metrics:
        raise UserError(f"no checkpoint of {source} has a metric: train with train.keep_best, or omit --best")
    return max(reversed(metrics), key=lambda path: metrics[path])
