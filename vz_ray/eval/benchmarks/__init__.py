"""Public benchmarks: read released files into tasks, score answers, compute official metrics.

One module per benchmark. Input: released annotation files and a folder of videos. Output: tasks, and for
scored episodes the benchmark's official metrics under strict and lenient scoring. Must not import Ray or
engines.
"""

from vz_ray.eval.benchmarks.aggregation import BenchmarkMetric, TaskScore
from vz_ray.eval.benchmarks.answer_scoring import (
    AnswerJudge,
    AnswerScore,
    AnswerStatus,
    JudgedAnswer,
    ScoredResult,
)
from vz_ray.eval.benchmarks.benchmark import Benchmark, BenchmarkFiles, score_results, select_scores
from vz_ray.eval.benchmarks.registry import ADAPTERS, get_adapter, load_benchmark
from vz_ray.eval.benchmarks.subsampling import subsample
from vz_ray.eval.benchmarks.video_folder import MissingVideos, find_missing_videos

__all__ = [
    "ADAPTERS",
    "AnswerJudge",
    "AnswerScore",
    "AnswerStatus",
    "Benchmark",
    "BenchmarkFiles",
    "BenchmarkMetric",
    "JudgedAnswer",
    "MissingVideos",
    "ScoredResult",
    "TaskScore",
    "find_missing_videos",
    "get_adapter",
    "load_benchmark",
    "score_results",
    "select_scores",
    "subsample",
]
