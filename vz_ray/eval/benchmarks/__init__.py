"""Public benchmarks: read released files into tasks, score answers, compute official metrics.

One module per benchmark. Input: released annotation files and a folder of videos. Output: tasks, and for
scored episodes the benchmark's official metrics under strict and lenient scoring. Must not import Ray or
engines.
"""

from vz_ray.eval.benchmarks.aggregation import BenchmarkMetric, TaskScore
from vz_ray.eval.benchmarks.answer_scoring import AnswerScore, AnswerStatus, ScoredResult
from vz_ray.eval.benchmarks.benchmark import (
    Benchmark,
    BenchmarkFiles,
    RecordAdapter,
    score_results,
    select_scores,
    subsample,
)
from vz_ray.eval.benchmarks.media_files import MissingVideos, find_missing_videos, image_cache_dir
from vz_ray.eval.benchmarks.registry import ADAPTERS, load_benchmark

__all__ = [
    "ADAPTERS",
    "AnswerScore",
    "AnswerStatus",
    "Benchmark",
    "BenchmarkFiles",
    "BenchmarkMetric",
    "MissingVideos",
    "RecordAdapter",
    "ScoredResult",
    "TaskScore",
    "find_missing_videos",
    "image_cache_dir",
    "load_benchmark",
    "score_results",
    "select_scores",
    "subsample",
]
