"""Registry of benchmark adapters: built-in ones by name, custom ones by `package.module:function`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import cast

from vz_ray.eval.benchmarks import (
    clevrer,
    longvideobench,
    longvideoreason,
    lvbench,
    mlvu,
    rl_tasks,
    tempcompass,
    temporalbench,
    vdc,
    video_mmlu,
    videomme,
    videommmu,
)
from vz_ray.eval.benchmarks.benchmark import Benchmark, BenchmarkAdapter, BenchmarkFiles
from vz_ray.utils.errors import UserError

ADAPTERS: Mapping[str, BenchmarkAdapter] = {
    "mlvu_dev": mlvu.read_dev,
    "mlvu_dev_open": mlvu.read_open,
    "mlvu_test": mlvu.read_test,
    "longvideobench": longvideobench.ADAPTER,
    "videomme": videomme.ADAPTER,
    "lvbench": lvbench.ADAPTER,
    "video_mmlu": video_mmlu.ADAPTER,
    "videommmu": videommmu.read,
    "longvideoreason": longvideoreason.ADAPTER,
    "temporalbench": temporalbench.read,
    "temporalbench_caption": temporalbench.read_captions,
    "tempcompass": tempcompass.read,
    "tempcompass_caption": tempcompass.read_captions,
    "vdc": vdc.read,
    "clevrer": clevrer.ADAPTER,
    "rl": rl_tasks.read,
}


def get_adapter(name: str) -> BenchmarkAdapter:
    """Return the adapter registered as `name`, or import `package.module:function`.

    Raises:
        UserError: The name is not registered, or the function cannot be imported.
    """
    if name in ADAPTERS:
        return ADAPTERS[name]
    module, colon, function = name.partition(":")
    if not colon:
        matches = difflib.get_close_matches(name, ADAPTERS, n=1)
        hint = f"did you mean {matches[0]}?" if matches else f"use one of {', '.join(ADAPTERS)},"
        raise UserError(f"unknown benchmark {name!r}; {hint} or a custom package.module:function")
    try:
        adapter = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"cannot import the benchmark {name}: {error}") from error
    if not callable(adapter):
        raise UserError(f"benchmark {name} is {type(adapter).__name__}; it must be a function")
    return cast(BenchmarkAdapter, adapter)


def load_benchmark(name: str, files: BenchmarkFiles) -> Benchmark:
    """Read a benchmark's files and check that it has tasks with unique ids.

    Raises:
        UserError: A file is malformed, there are no questions, or two questions have the same id.
    """
    benchmark = get_adapter(name)(files)
    if not isinstance(benchmark, Benchmark):
        raise UserError(f"benchmark {name} returned {type(benchmark).__name__}; it must return a Benchmark")
    if not benchmark.tasks:
        raise UserError(f"{files.annotations} has 0 questions of {benchmark.title}")
    task_ids: set[str] = set()
    for task in benchmark.tasks:
        if task.task_id in task_ids:
            raise UserError(f"{files.annotations} has two questions with id {task.task_id!r}")
        task_ids.add(task.task_id)
    return benchmark
