"""Numbered directories, each written whole: `step-000012` and its kind; which are kept, which deleted.

A directory is deleted under another name than its own, so that what has the name of a step is whole,
whenever the process that deletes it ends.
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
_LEFT = re.compile(r"\.step-\d{6,}\.(partial|retired)")


def step_name(step: int) -> str:
    """The name of a step's directory."""
    return f"step-{step:06d}"


def list_steps(folder: Path) -> list[Path]:
    """Complete steps, oldest first."""
    found = {path: _STEP.fullmatch(path.name) for path in folder.glob("step-*")}
    return sorted((path for path, match in found.items() if match), key=lambda path: int(path.name[5:]))


def write_step_metric(step: Path, name: str, value: float) -> None:
    """Notes by which figure a step is compared with others; the higher the better."""
    write_atomic(step / METRIC_FILE, json.dumps({"metric": name, "value": value}).encode())


def read_step_metric(step: Path) -> float | None:
    """What `write_figure` noted; None if nothing, or no number."""
    try:
        value = float(json.loads((step / METRIC_FILE).read_text())["value"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if math.isnan(value) else value


def select_steps_to_keep(metrics: dict[Path, float | None], keep_last: int, keep_best: int) -> set[Path]:
    """Which of these steps, oldest first, are kept. Pure.

    Args:
        metrics: One per step; a step without is kept for its age alone.
        keep_last: How many of the last are kept, at least 1.
        keep_best: How many of those with the highest figures are kept; of equal ones the newer.
    """
    steps = list(metrics)
    known = sorted((value, index) for index, value in enumerate(metrics.values()) if value is not None)
    return {*steps[-max(keep_last, 1) :], *(steps[index] for _, index in known[::-1][:keep_best])}


def prune_steps(folder: Path, keep_last: int, keep_best: int = 0) -> None:
    """Deletes all steps but those `retained`, and what killed processes left of others."""
    for left in folder.iterdir():
        if _LEFT.fullmatch(left.name):
            shutil.rmtree(left)
    steps = list_steps(folder)
    kept = select_steps_to_keep({step: read_step_metric(step) for step in steps}, keep_last, keep_best)
    doomed = [step for step in steps if step not in kept]
    for step in doomed:
        step.rename(step.with_name(f".{step.name}.retired"))
    if doomed:
        sync_directory(folder)
    for step in doomed:
        shutil.rmtree(step.with_name(f".{step.name}.retired"))
