"""Step directories `step-000012`, each written atomically, and their retention.

A directory is renamed before it is deleted, so a directory with a step's name is always complete, even if the
deleting process is killed.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

from vz_ray.utils.atomic_files import sync_directory, write_atomic

METRIC_FILE = "metric.json"
_STEP = re.compile(r"step-(\d{6,})")
_LEFTOVER = re.compile(r"\.step-\d{6,}\.(partial|retired)")


def step_name(step: int) -> str:
    """Return the directory name of a step."""
    return f"step-{step:06d}"


def list_steps(folder: Path) -> list[Path]:
    """Return the complete step directories, oldest first."""
    steps = [path for path in folder.glob("step-*") if _STEP.fullmatch(path.name)]
    return sorted(steps, key=lambda path: int(path.name[5:]))


def write_step_metric(step: Path, name: str, value: float) -> None:
    """Store the metric by which steps are compared; higher is better."""
    write_atomic(step / METRIC_FILE, json.dumps({"metric": name, "value": value}).encode())


def read_step_metric(step: Path) -> float | None:
    """Return the value stored by `write_step_metric`; None if it is missing, invalid or NaN."""
    try:
        value = float(json.loads((step / METRIC_FILE).read_text())["value"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if math.isnan(value) else value


def select_steps_to_keep(metrics: dict[Path, float | None], keep_last: int, keep_best: int) -> set[Path]:
    """Return the steps to keep. Pure.

    Args:
        metrics: Metric of each step, oldest first. A step without a metric is kept by age only.
        keep_last: Number of newest steps to keep, at least 1.
        keep_best: Number of steps with the highest metric to keep. Of equal steps, the newer is kept.
    """
    steps = list(metrics)
    ranked = sorted((value, index) for index, value in enumerate(metrics.values()) if value is not None)
    return {*steps[-max(keep_last, 1) :], *(steps[index] for _, index in ranked[::-1][:keep_best])}


def prune_steps(folder: Path, keep_last: int, keep_best: int = 0) -> None:
    """Delete all steps except those of `select_steps_to_keep`, and the leftovers of killed processes."""
    for path in folder.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path)
    steps = list_steps(folder)
    kept = select_steps_to_keep({step: read_step_metric(step) for step in steps}, keep_last, keep_best)
    retired = [step for step in steps if step not in kept]
    for step in retired:
        step.rename(step.with_name(f".{step.name}.retired"))
    if retired:
        sync_directory(folder)
    for step in retired:
        shutil.rmtree(step.with_name(f".{step.name}.retired"))
