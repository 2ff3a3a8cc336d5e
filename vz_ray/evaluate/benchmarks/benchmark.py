"""What a benchmark is: questions, how an answer is marked, and its official figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vz_ray.data.task import Task
from vz_ray.evaluate.benchmarks.figures import Figure, Scored
from vz_ray.evaluate.benchmarks.marks import (
    LEFT_OUT,
    Judge,
    Mark,
    Marked,
    Marker,
    judged_by_reward,
    mark_answer,
    mark_judged,
    mark_leniently,
    mark_strictly,
)
from vz_ray.evaluate.results import EvalResult
from vz_ray.reward.accuracy import JUDGED
from vz_ray.reward.choice import LETTERS


@dataclass(frozen=True, slots=True)
class Source:
    """Where a benchmark's released files are.

    Attributes:
        annotations: File or folder.
        videos: Folder.
        answers: File with the truth, where it is apart.
        subtitles: Folder; None shows none.
        embedding_model: Folder of a sentence-embedding model; None where there is none.
        pictures: Folder in which images of questions are kept as videos of one frame.
    """

    annotations: Path
    videos: Path
    answers: Path | None = None
    subtitles: Path | None = None
    embedding_model: Path | None = None
    pictures: Path = Path("pictures")


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark, read.

    Attributes:
        title: Its name for people.
        tasks: Its questions, in the order of the file; ids are unique.
        figures: The official figures of scored samples, headlines first. Pure.
        mark: What a text that states an answer is worth; not asked of answers whose type takes a judge.
        released: Questions in the released file; 0 where that is not known.
        notes: What was found odd in the files, or cannot be measured.
    """

    title: str
    tasks: tuple[Task, ...]
    figures: Callable[[Sequence[Scored]], list[Figure]]
    mark: Marker = mark_answer
    released: int = 0
    notes: tuple[str, ...] = field(default=())


Adapter = Callable[[Source], Benchmark]
"""Reads a benchmark's files. Raises `UserError` that names file, record and field."""


def lettered(options: Sequence[str]) -> dict[str, str]:
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


def ask(question: str, options: dict[str, str]) -> str:
    """A question with its options, one per line."""
    return "\n".join([question.strip(), *(f"{letter}. {text}" for letter, text in options.items())])


def mark_all(
    benchmark: Benchmark, results: Sequence[EvalResult], judge: Judge = judged_by_reward
) -> list[Marked]:
    """What each result is worth, strictly and leniently."""
    return [_marked(benchmark, result, judge) for result in results]


def _marked(benchmark: Benchmark, result: EvalResult, judge: Judge) -> Marked:
    task, played = result.task, result.trajectory
    if task.answer_type in JUDGED:
        judged = mark_judged(result, judge)
        return Marked(result, judged, judged)
    strict = mark_strictly(benchmark.mark, task, played)
    return Marked(result, strict, mark_leniently(benchmark.mark, strict, task, played))


def scored(marked: Sequence[Marked], mark_of: Callable[[Marked], Mark]) -> list[Scored]:
    """What figures are taken of: everything that could be played and judged."""
    marks = [(sample.task, mark_of(sample)) for sample in marked]
    return [Scored(task, mark.score, mark.detail) for task, mark in marks if mark.reading not in LEFT_OUT]
