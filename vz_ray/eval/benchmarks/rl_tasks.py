"""The project's own task files (RL schema), one or several: the needle world and data sets in its shape.

A YAML file lists several, each with its own sampling:

    datasets:
      - json_path: first.json
        sampling_strategy: first:100
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from vz_ray.data.task_file import read_tasks
from vz_ray.env.task import Task
from vz_ray.eval.benchmarks.aggregation import (
    BenchmarkMetric,
    TaskScore,
    accuracy_metric,
    accuracy_table,
    kind_label,
)
from vz_ray.eval.benchmarks.benchmark import Benchmark, BenchmarkFiles
from vz_ray.eval.benchmarks.subsampling import subsample
from vz_ray.utils.errors import UserError

KEYS = {"json_path", "sampling_strategy"}


def compute_metrics(samples: Sequence[TaskScore]) -> list[BenchmarkMetric]:
    """Accuracy overall, by data source and by kind, where there are several."""
    sources = accuracy_table(samples, "data source", lambda task: task.source or "unnamed")
    kinds = accuracy_table(samples, "kind", lambda task: kind_label(task) or "other")
    return [
        accuracy_metric(samples),
        *(sources if len(sources) > 1 else ()),
        *(kinds if len(kinds) > 1 else ()),
    ]


def read(source: BenchmarkFiles) -> Benchmark:
    """Reads one JSON file, or those that a YAML file lists."""
    file = source.annotations
    if file.suffix in (".yaml", ".yml"):
        sets = [_set(file, index, entry) for index, entry in enumerate(_listed(file))]
        tasks = [task for tasks in sets for task in tasks]
        if len({task.task_id for task in tasks}) < len(tasks):
            tasks = [replace(t, task_id=f"{i}/{t.task_id}") for i, tasks in enumerate(sets) for t in tasks]
    else:
        tasks = read_tasks(file)
    return Benchmark(f"{file.parent.name}/{file.stem}", tuple(tasks), compute_metrics)


def _listed(file: Path) -> list[Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    listed = values.get("datasets") if isinstance(values, dict) else None
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{file}: expected `datasets:` with a list of `json_path: ...`")
    return listed


def _set(file: Path, index: int, entry: Any) -> list[Task]:
    if not isinstance(entry, dict) or "json_path" not in entry or not set(entry) <= KEYS:
        raise UserError(
            f"{file}, data set {index}: expected json_path and perhaps sampling_strategy, found {entry}"
        )
    path = file.parent / str(entry["json_path"])
    return subsample(read_tasks(path), str(entry.get("sampling_strategy", "all")))
