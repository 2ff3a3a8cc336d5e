"""Public benchmarks: their released files read into tasks, their answers marked, their official figures.

One small file per benchmark. In: annotation files as released and a folder of
videos. Out: tasks to be played, and of played tasks the benchmark's own
figures, read strictly and leniently. Pure: knows neither Ray nor engines; who
played an episode makes no difference.
"""

from vz_ray.evaluate.benchmarks.benchmark import Benchmark, Source, mark_all, scored
from vz_ray.evaluate.benchmarks.figures import Figure, Scored
from vz_ray.evaluate.benchmarks.marks import Judge, Mark, Marked, Reading, Verdict
from vz_ray.evaluate.benchmarks.registry import ADAPTERS, find_adapter, read_benchmark
from vz_ray.evaluate.benchmarks.sampling import sample
from vz_ray.evaluate.benchmarks.videos import Missing, missing_videos

__all__ = [
    "ADAPTERS",
    "Benchmark",
    "Figure",
    "Judge",
    "Mark",
    "Marked",
    "Missing",
    "Reading",
    "Scored",
    "Source",
    "Verdict",
    "find_adapter",
    "mark_all",
    "missing_videos",
    "read_benchmark",
    "sample",
    "scored",
]
