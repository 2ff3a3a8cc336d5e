"""Public benchmarks: their released files read into tasks, their answers marked, their official figures.

One small file per benchmark. In: annotation files as released and a folder of
videos. Out: tasks to be played, and of played tasks the benchmark's own
figures, read strictly and leniently. Pure: knows neither Ray nor engines; who
played an episode makes no difference.
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
    "Benchmark",
    "BenchmarkMetric",
    "AnswerJudge",
    "AnswerScore",
    "ScoredResult",
    "MissingVideos",
    "AnswerStatus",
    "TaskScore",
    "BenchmarkFiles",
    "JudgedAnswer",
    "get_adapter",
    "score_results",
    "find_missing_videos",
    "load_benchmark",
    "subsample",
    "select_scores",
]
