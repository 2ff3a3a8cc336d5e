"""A benchmark: tasks, scoring of an answer, and official metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vz_ray.env.task import Task
from vz_ray.eval.benchmarks.aggregation import BenchmarkMetric, TaskScore
from vz_ray.eval.benchmarks.answer_scoring import (
    EXCLUDED_STATUSES,
    AnswerJudge,
    AnswerScore,
    AnswerScorer,
    ScoredResult,
    judge_from_reward,
    score_by_type,
    score_judged,
    score_leniently,
    score_strictly,
)
from vz_ray.eval.eval_log import EvalResult
from vz_ray.rewards.accuracy import JUDGED_ANSWER_TYPES
from vz_ray.rewards.multiple_choice import LETTERS


@dataclass(frozen=True, slots=True)
class BenchmarkFiles:
    """Locations of a benchmark's released files.

    Attributes:
        annotations: Annotation file or folder.
        video_dir: Folder of the videos.
        answer_file: File with the reference answers, if they are released separately.
        subtitle_dir: Folder of subtitles; None disables subtitles.
        embedding_model_dir: Folder of a sentence-embedding model; optional.
        image_dir: Cache folder for question images, which are stored as videos of one frame.
    """

    annotations: Path
    video_dir: Path
    answer_file: Path | None = None
    subtitle_dir: Path | None = None
    embedding_model_dir: Path | None = None
    image_dir: Path = Path("question_images")


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark as read from its files.

    Attributes:
        title: Display name.
        tasks: Tasks in file order; ids are unique.
        compute_metrics: Pure function from task scores to official metrics, headlines first.
        score_answer: Scores an answer text. Not called for answer types that need a judge.
        num_released: Number of questions in the released file; 0 if unknown.
        notes: Oddities in the files, and what cannot be measured.
    """

    title: str
    tasks: tuple[Task, ...]
    compute_metrics: Callable[[Sequence[TaskScore]], list[BenchmarkMetric]]
    score_answer: AnswerScorer = score_by_type
    num_released: int = 0
    notes: tuple[str, ...] = field(default=())


BenchmarkAdapter = Callable[[BenchmarkFiles], Benchmark]
"""Reads a benchmark's files. Raises `UserError` with file, record and field if they are malformed."""


def letter_options(options: Sequence[str]) -> dict[str, str]:
    """Map letters to options; letters that all options already have (`A. disc`, `(A) disc`) are stripped.

    Raises:
        ValueError: There are more options than letters.
    """
    if len(options) > len(LETTERS):
        raise ValueError(f"{len(options)} options; the maximum is {len(LETTERS)}")
    letters = LETTERS[: len(options)]
    for style in ("{}.", "({})", "{})", "{}:"):
        prefixes = [style.format(letter) for letter in letters]
        if all(option.startswith(prefix) for option, prefix in zip(options, prefixes, strict=True)):
            texts = [option[len(prefix) :].strip() for option, prefix in zip(options, prefixes, strict=True)]
            return dict(zip(letters, texts, strict=True))
    return dict(zip(letters, options, strict=True))


def format_question(question: str, options: dict[str, str]) -> str:
    """Return the question followed by its options, one per line."""
    return "\n".join([question.strip(), *(f"{letter}. {text}" for letter, text in options.items())])


def score_results(
    benchmark: Benchmark, results: Sequence[EvalResult], judge: AnswerJudge = judge_from_reward
) -> list[ScoredResult]:
    """Score each result strictly and leniently."""
    return [_score_result(benchmark, result, judge) for result in results]


def _score_result(benchmark: Benchmark, result: EvalResult, judge: AnswerJudge) -> ScoredResult:
    task, trajectory = result.task, result.trajectory
    if task.answer_type in JUDGED_ANSWER_TYPES:
        judged = score_judged(result, judge)
        return ScoredResult(result, judged, judged)
    strict = score_strictly(benchmark.score_answer, task, trajectory)
    return ScoredResult(result, strict, score_leniently(benchmark.score_answer, strict, task, trajectory))


def select_scores(results: Sequence[ScoredResult], select: Callable[[ScoredResult], AnswerScore]) -> list[TaskScore]:
    """Return the selected score of each result; failed and unjudged results are excluded."""
    scores = [(result.task, select(result)) for result in results]
    return [
        TaskScore(task, score.score, score.detail) for task, score in scores if score.status not in EXCLUDED_STATUSES
    ]
