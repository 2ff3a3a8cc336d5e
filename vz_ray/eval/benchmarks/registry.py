"""Benchmarks by name; a user's own by dotted path."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping

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
    "longvideobench": longvideobench.read,
    "videomme": videomme.read,
    "lvbench": lvbench.read,
    "video_mmlu": video_mmlu.read,
    "videommmu": videommmu.read,
    "longvideoreason": longvideoreason.read,
    "temporalbench": temporalbench.read,
    "temporalbench_caption": temporalbench.read_captions,
    "tempcompass": tempcompass.read,
    "tempcompass_caption": tempcompass.read_captions,
    "vdc": vdc.read,
    "clevrer": clevrer.read,
    "rl": rl_tasks.read,
}


def get_adapter(name: str) -> BenchmarkAdapter:
    """A benchmark's adapter: one of `ADAPTERS`, or `package.module:function`.

    Raises:
        UserError: There is none of this name, or the function cannot be imported.
    """
    if name in ADAPTERS:
        return ADAPTERS[name]
    module, colon, function = name.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, ADAPTERS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(ADAPTERS)}"
        raise UserError(f"no benchmark {name!r}; {hint} A function of your own is package.module:function")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"cannot import the benchmark {name}: {error}") from error
    if not callable(found):
        raise UserError(f"the benchmark {name} is no function but {type(found).__name__}")
    adapter: BenchmarkAdapter = found
    return adapter


def load_benchmark(name: str, source: BenchmarkFiles) -> Benchmark:
    """Reads a benchmark's files and checks what every benchmark must hold to.

    Raises:
        UserError: A file is not what it should be, there are no questions, or two of one id.
    """
    benchmark = get_adapter(name)(source)
    if not isinstance(benchmark, Benchmark):
        raise UserError(f"the benchmark {name} returned {type(benchmark).__name__}, not a Benchmark")
    if not benchmark.tasks:
        raise UserError(f"{source.annotations} holds no questions of {benchmark.title}")
    seen: set[str] = set()
    for task in benchmark.tasks:
        if task.task_id in seen:
            raise UserError(f"{source.annotations} has two questions with id {task.task_id!r}")
        seen.add(task.task_id)
    return benchmark
