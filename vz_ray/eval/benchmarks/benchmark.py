"""A benchmark: files, adapter, tasks, scoring of answers, and official metrics.

A benchmark whose annotation file has one record per question or per video is a `RecordAdapter`: file names,
schema, a function from a record to tasks, and metrics. Other layouts are functions of `BenchmarkFiles`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from vz_ray.config.eval_run import SAMPLING_STRATEGY_PATTERN
from vz_ray.env.task import SubtitleFile, Task
from vz_ray.eval.benchmarks.aggregation import ComputeMetrics, TaskScore
from vz_ray.eval.benchmarks.annotation_files import (
    AnnotationRecord,
    AnnotationSchema,
    find_annotation_file,
    read_annotations,
)
from vz_ray.eval.benchmarks.answer_scoring import (
    EXCLUDED_STATUSES,
    AnswerScore,
    AnswerScorer,
    ScoredResult,
    score_by_type,
    score_judged,
    score_leniently,
    score_strictly,
)
from vz_ray.eval.benchmarks.media_files import VideoFolder, check_subtitles, drop_missing_subtitles
from vz_ray.eval.eval_log import EvalResult
from vz_ray.rewards.accuracy import JUDGED_ANSWER_TYPES
from vz_ray.rewards.multiple_choice import LETTERS

T = TypeVar("T")


@dataclass(frozen=True)
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

    @cached_property
    def videos(self) -> VideoFolder:
        return VideoFolder(self.video_dir)

    def subtitles(self, name: str, offset_s: float = 0.0) -> SubtitleFile | None:
        """Return the subtitle file `name`; None if subtitles are disabled."""
        return SubtitleFile(str(self.subtitle_dir / name), offset_s) if self.subtitle_dir else None


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark as read from its files.

    Attributes:
        title: Display name.
        tasks: Tasks in file order; ids are unique.
        compute_metrics: Computes the official metrics from task scores.
        score_answer: Scores an answer text. Not called for answer types that need a judge.
        num_released: Number of questions in the released file; 0 if unknown.
        notes: Oddities in the files, and what cannot be measured.
    """

    title: str
    tasks: tuple[Task, ...]
    compute_metrics: ComputeMetrics
    score_answer: AnswerScorer = score_by_type
    num_released: int = 0
    notes: tuple[str, ...] = ()


BenchmarkAdapter = Callable[[BenchmarkFiles], Benchmark]
"""Reads a benchmark's files. Raises `UserError` with file, record and field if they are malformed."""


@dataclass(frozen=True, slots=True)
class RecordAdapter:
    """Adapter of a benchmark with one annotation file.

    Attributes:
        title: Display name, and `source` of tasks without one.
        file_names: Names of the annotation file, or patterns, in order of preference.
        schema: Fields of a record.
        read_record: Converts a record to its task, or to several. Paths of videos and subtitles come from
            the given `BenchmarkFiles`.
        compute_metrics: Computes the official metrics.
        score_answer: Scores an answer text.
        num_released: Number of questions in the released file; 0 if unknown.
        optional_subtitles: Whether videos may have no subtitle file.
        find_oddities: Returns notes on the tasks.
    """

    title: str
    file_names: tuple[str, ...]
    schema: AnnotationSchema
    read_record: Callable[[AnnotationRecord, BenchmarkFiles], Task | Iterable[Task]]
    compute_metrics: ComputeMetrics
    score_answer: AnswerScorer = score_by_type
    num_released: int = 0
    optional_subtitles: bool = False
    find_oddities: Callable[[Sequence[Task]], Sequence[str]] = lambda tasks: ()

    def __call__(self, files: BenchmarkFiles) -> Benchmark:
        """Read the benchmark. See `BenchmarkAdapter`."""
        tasks: list[Task] = []
        for record in read_annotations(find_annotation_file(files.annotations, *self.file_names), self.schema):
            converted = self.read_record(record, files)
            tasks += [converted] if isinstance(converted, Task) else converted
        tasks = [replace(task, source=task.source or self.title) for task in tasks]
        notes = tuple(self.find_oddities(tasks))
        if files.subtitle_dir is not None and any(task.subtitles for task in tasks):
            if self.optional_subtitles:
                tasks = drop_missing_subtitles(tasks, files.subtitle_dir)
            notes += check_subtitles(tasks)
        return Benchmark(
            title=self.title,
            tasks=tuple(tasks),
            compute_metrics=self.compute_metrics,
            score_answer=self.score_answer,
            num_released=self.num_released,
            notes=notes,
        )


# -- questions --------------------------------------------------------------------


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


def subsample(items: Sequence[T], strategy: str, seed: int = 0) -> list[T]:
    """Return the subset of `items` that a strategy selects, in the original order.

    Args:
        items: Items to select from.
        strategy: `all`; `first:20` or `end:20` from either end; `random:20` or `20%` at random.
        seed: Seed of random selections.

    Raises:
        ValueError: `strategy` has another format.
    """
    match = re.fullmatch(SAMPLING_STRATEGY_PATTERN, strategy)
    if match is None:
        raise ValueError(f"sampling strategy is {strategy!r}; it must be all, first:N, end:N, random:N or N%")
    if strategy == "all":
        return list(items)
    if strategy.endswith("%"):
        count = round(len(items) * float(strategy.removesuffix("%")) / 100)
    else:
        count = int(strategy.partition(":")[2])
    count = min(count, len(items))
    if strategy.startswith("first"):
        return list(items[:count])
    if strategy.startswith("end"):
        return list(items[len(items) - count :])
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), count))]


# -- scoring ----------------------------------------------------------------------


def score_results(benchmark: Benchmark, results: Sequence[EvalResult]) -> list[ScoredResult]:
    """Score each result strictly and leniently."""
    return [_score_result(benchmark.score_answer, result) for result in results]


def _score_result(scorer: AnswerScorer, result: EvalResult) -> ScoredResult:
    task, trajectory = result.task, result.trajectory
    if task.answer_type in JUDGED_ANSWER_TYPES:
        judged = score_judged(trajectory)
        return ScoredResult(result, judged, judged)
    strict = score_strictly(scorer, task, trajectory)
    return ScoredResult(result, strict, score_leniently(scorer, strict, task, trajectory))


def select_scores(results: Sequence[ScoredResult], select: Callable[[ScoredResult], AnswerScore]) -> list[TaskScore]:
    """Return the selected score of each result; failed and unjudged results are excluded."""
    scores = [(result.task, select(result)) for result in results]
    return [
        TaskScore(task, score.score, score.detail) for task, score in scores if score.status not in EXCLUDED_STATUSES
    ]
