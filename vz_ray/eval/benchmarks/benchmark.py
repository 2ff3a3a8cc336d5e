"""What a benchmark is: questions, how an answer is marked, and its official figures."""

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
    """Where a benchmark's released files are.

    Attributes:
        annotations: File or folder.
        video_dir: Folder.
        answer_file: File with the truth, where it is apart.
        subtitle_dir: Folder; None shows none.
        embedding_model_dir: Folder of a sentence-embedding model; None where there is none.
        image_dir: Folder in which images of questions are kept as videos of one frame.
    """

    annotations: Path
    video_dir: Path
    answer_file: Path | None = None
    subtitle_dir: Path | None = None
    embedding_model_dir: Path | None = None
    image_dir: Path = Path("image_dir")


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark, read.

    Attributes:
        title: Its name for people.
        tasks: Its questions, in the order of the file; ids are unique.
        compute_metrics: The official figures of scored samples, headlines first. Pure.
        score_answer: What a text that states an answer is worth; not asked of answers whose type takes a judge.
        num_released: Questions in the released file; 0 where that is not known.
        notes: What was found odd in the files, or cannot be measured.
    """

    title: str
    tasks: tuple[Task, ...]
    compute_metrics: Callable[[Sequence[TaskScore]], list[BenchmarkMetric]]
    score_answer: AnswerScorer = score_by_type
    num_released: int = 0
    notes: tuple[str, ...] = field(default=())


BenchmarkAdapter = Callable[[BenchmarkFiles], Benchmark]
"""Reads a benchmark's files. Raises `UserError` that names file, record and field."""


def letter_options(options: Sequence[str]) -> dict[str, str]:
    """Options by letter; letters that they bring themselves (`A. disc`, `(A) disc`) are taken off.

    Raises:
        ValueError: There are more than letters.
    """
    if len(options) > len(LETTERS):
        raise ValueError(f"{len(options)} options, more than there are letters")
    letters = LETTERS[: len(options)]
    for mark in ("{}.", "({})", "{})", "{}:"):
        heads = [mark.format(letter) for letter in letters]
        if all(option.startswith(head) for option, head in zip(options, heads, strict=True)):
            bare = [option[len(head) :].strip() for option, head in zip(options, heads, strict=True)]
            return dict(zip(letters, bare, strict=True))
    return dict(zip(letters, options, strict=True))


def format_question(question: str, options: dict[str, str]) -> str:
    """A question with its options, one per line."""
    return "\n".join([question.strip(), *(f"{letter}. {text}" for letter, text in options.items())])


def score_results(
    benchmark: Benchmark, results: Sequence[EvalResult], judge: AnswerJudge = judge_from_reward
) -> list[ScoredResult]:
    """What each result is worth, strictly and leniently."""
    return [_marked(benchmark, result, judge) for result in results]


def _marked(benchmark: Benchmark, result: EvalResult, judge: AnswerJudge) -> ScoredResult:
    task, played = result.task, result.trajectory
    if task.answer_type in JUDGED_ANSWER_TYPES:
        judged = score_judged(result, judge)
        return ScoredResult(result, judged, judged)
    strict = score_strictly(benchmark.score_answer, task, played)
    return ScoredResult(result, strict, score_leniently(benchmark.score_answer, strict, task, played))


def select_scores(
    marked: Sequence[ScoredResult], mark_of: Callable[[ScoredResult], AnswerScore]
) -> list[TaskScore]:
    """What figures are taken of: everything that could be played and judged."""
    marks = [(sample.task, mark_of(sample)) for sample in marked]
    return [
        TaskScore(task, mark.score, mark.detail)
        for task, mark in marks
        if mark.status not in EXCLUDED_STATUSES
    ]
