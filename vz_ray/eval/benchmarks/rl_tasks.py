"""vz_ray's own task files (RL schema), such as those of the needle world.

A YAML file lists several task files, each with its own sampling strategy:

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
from vz_ray.eval.benchmarks.benchmark import Benchmark, BenchmarkFiles, subsample
from vz_ray.utils.errors import UserError

DATASET_KEYS = {"json_path", "sampling_strategy"}


def compute_metrics(scores: Sequence[TaskScore]) -> list[BenchmarkMetric]:
    """Return the overall accuracy, and the accuracy by data source and by kind if there are several."""
    sources = accuracy_table(scores, "data source", lambda task: task.source or "unnamed")
    kinds = accuracy_table(scores, "kind", lambda task: kind_label(task) or "other")
    return [
        accuracy_metric(scores),
        *(sources if len(sources) > 1 else ()),
        *(kinds if len(kinds) > 1 else ()),
    ]


def read(files: BenchmarkFiles) -> Benchmark:
    """Read one JSON file, or the files that a YAML file lists."""
    file = files.annotations
    if file.suffix in (".yaml", ".yml"):
        datasets = [_read_dataset(file, index, entry) for index, entry in enumerate(_list_datasets(file))]
        tasks = [task for dataset in datasets for task in dataset]
        if len({task.task_id for task in tasks}) < len(tasks):
            tasks = [
                replace(task, task_id=f"{index}/{task.task_id}")
                for index, dataset in enumerate(datasets)
                for task in dataset
            ]
    else:
        tasks = read_tasks(file)
    return Benchmark(f"{file.parent.name}/{file.stem}", tuple(tasks), compute_metrics)


def _list_datasets(file: Path) -> list[Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    datasets = values.get("datasets") if isinstance(values, dict) else None
    if not isinstance(datasets, list) or not datasets:
        raise UserError(f"{file}: expected `datasets:` with a list of `json_path: ...`")
    return datasets


def _read_dataset(file: Path, index: int, entry: Any) -> list[Task]:
    if not isinstance(entry, dict) or "json_path" not in entry or not set(entry) <= DATASET_KEYS:
        raise UserError(f"{file}, dataset {index}: expected json_path and optional sampling_strategy, got {entry}")
    path = file.parent / str(entry["json_path"])
    return subsample(read_tasks(path), str(entry.get("sampling_strategy", "all")))
