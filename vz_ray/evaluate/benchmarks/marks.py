"""What one answer is worth: read strictly from the answer span, or leniently from the last turn.

Strict reads the span alone. Lenient takes what the last turn says outside its
reasoning, where there is no span or it states no answer. Neither guesses: an
answer that cannot be read is wrong, and counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction

from vz_ray.data.task import AnswerType, Task
from vz_ray.episode.trajectory import Status, Trajectory
from vz_ray.evaluate.benchmarks.figures import GRADE
from vz_ray.evaluate.results import EvalResult
from vz_ray.reward import number_equal, options_of, parse_choice, parse_number
from vz_ray.reward.choice import LETTERS
from vz_ray.reward.math_answer import math_equal
from vz_ray.reward.span import bare, folded

_THOUGHT = re.compile(r"<think>.*?(?:</think>|$)", re.DOTALL)
_TAG = re.compile(r"</?(?:answer|think|video_zoom)>|<video_zoom>.*?(?:</video_zoom>|$)", re.DOTALL)
_CLAIM = re.compile(
    r"\b(?:answer|option|choice)\b(?:\s+(?:is|would be|should be))?\s*[:=]?\s*(.+)", re.IGNORECASE
)


class Reading(StrEnum):
    """How far an answer got."""

    READ = "read"
    UNPARSED = "unparsed"
    """There is an answer, and it states no option, number or whatever was asked for: wrong."""
    NO_ANSWER = "no_answer"
    """There is no answer: wrong."""
    UNJUDGED = "unjudged"
    """Nobody could say whether it is right: left out of every figure."""
    FAILED = "failed"
    """The episode could not be played: left out of every figure."""


LEFT_OUT = (Reading.UNJUDGED, Reading.FAILED)


@dataclass(frozen=True, slots=True)
class Mark:
    """What an answer is worth.

    Attributes:
        reading: How far it got.
        score: In `[0, 1]`; 0 unless it was read.
        answer: What was read, in the benchmark's own terms.
        detail: Whatever else the metric counts.
    """

    reading: Reading
    score: float = 0.0
    answer: str = ""
    detail: Mapping[str, float] = field(default_factory=dict)


Marker = Callable[[Task, str], Mark]
"""What a text that should state the answer is worth."""

UNPARSED = Mark(Reading.UNPARSED)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge found: how right, in `[0, 1]`, and a grade from 0 to 5 if it gave one."""

    right: float
    grade: float | None = None


Judge = Callable[[EvalResult], Verdict | None]
"""Judges an open answer; None where it cannot."""


@dataclass(frozen=True, slots=True)
class Marked:
    """A played question and what it is worth, read both ways."""

    result: EvalResult
    strict: Mark
    lenient: Mark

    @property
    def task(self) -> Task:
        return self.result.task


# -- reading ----------------------------------------------------------------------


def options_in(task: Task) -> dict[str, str]:
    """Options by letter: those that the adapter knows, else those written in the question."""
    known = task.extra.get("options")
    return (
        {str(k): str(v) for k, v in known.items()} if isinstance(known, dict) else options_of(task.question)
    )


def mark_choice(task: Task, text: str) -> Mark:
    """One of several options, by letter or by its text; an answer without letters, by its words."""
    options = options_in(task)
    if task.answer not in LETTERS:
        return mark_words(task, text)
    # A truth that is no option's letter: the options could not be read, so letters are all there is.
    letter = parse_choice(text, options if task.answer in options else {})
    return UNPARSED if letter is None else Mark(Reading.READ, float(letter == task.answer), letter)


def mark_words(task: Task, text: str) -> Mark:
    """The same words, apart from case, spaces and what stands around an answer."""
    said = folded(bare(text))
    return Mark(Reading.READ, float(said == folded(bare(task.answer))), said) if said else UNPARSED


def mark_number(task: Task, text: str) -> Mark:
    """The same number or formula."""
    if parse_number(task.answer) is None:
        right = math_equal(text, task.answer)
    else:
        right = number_equal(text, task.answer)
    return UNPARSED if right is None else Mark(Reading.READ, float(right), text.strip()[:80])


def mark_open(task: Task, text: str) -> Mark:
    """A short open answer: the same number to two decimals, or the truth's words within the answer.

    Source: the open questions of MMMU and VideoMMMU; there the truth has to be
    part of what is answered, and here it has to be whole words of it.
    """
    truth = parse_number(task.answer)
    if truth is not None:
        number = parse_number(text)
        if number is None:
            return UNPARSED
        return Mark(Reading.READ, float(_rounded(number) == _rounded(truth)), str(float(number)))
    said, wanted = folded(bare(text)), folded(task.answer)
    if not said:
        return UNPARSED
    inside = re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", said) is not None
    return Mark(Reading.READ, float(inside), said[:80])


def _rounded(number: Fraction) -> Fraction:
    return round(number * 100) / Fraction(100)


def mark_answer(task: Task, text: str) -> Mark:
    """By the task's answer type. Not for answers that take a judge."""
    return mark_number(task, text) if task.answer_type is AnswerType.NUMBER else mark_choice(task, text)


# -- strict and lenient -----------------------------------------------------------


def said_last(trajectory: Trajectory) -> str:
    """What the last turn says outside its reasoning, tags and calls taken off."""
    text = trajectory.turns[-1].text if trajectory.turns else ""
    return _TAG.sub("", _THOUGHT.sub("", text)).strip()


def claims(text: str) -> list[str]:
    """Parts of a text that may state its answer: what it calls the answer, its last line, all of it."""
    if not text:
        return []
    called = _CLAIM.findall(text)
    return [*(called[-1:]), text.split("\n")[-1], text]


def mark_strictly(marker: Marker, task: Task, trajectory: Trajectory) -> Mark:
    """The answer span alone."""
    if trajectory.status is Status.FAILED:
        return Mark(Reading.FAILED)
    if trajectory.answer is None:
        return Mark(Reading.NO_ANSWER)
    return marker(task, trajectory.answer)


def mark_leniently(marker: Marker, strict: Mark, task: Task, trajectory: Trajectory) -> Mark:
    """As `strict`, or what the last turn says where that cannot be read."""
    if strict.reading not in (Reading.UNPARSED, Reading.NO_ANSWER):
        return strict
    found = (marker(task, claim) for claim in claims(said_last(trajectory)))
    return next((mark for mark in found if mark.reading is Reading.READ), strict)


def mark_judged(result: EvalResult, judge: Judge) -> Mark:
    """As a judge says; no answer is wrong without asking it."""
    if result.trajectory.status is Status.FAILED:
        return Mark(Reading.FAILED)
    if result.trajectory.answer is None:
        return Mark(Reading.NO_ANSWER, detail={GRADE: 0.0})
    verdict = judge(result)
    if verdict is None:
        return Mark(Reading.UNJUDGED)
    detail = {} if verdict.grade is None else {GRADE: verdict.grade}
    return Mark(Reading.READ, verdict.right, result.trajectory.answer[:80], detail)


def judged_by_reward(result: EvalResult) -> Verdict | None:
    """What the judge of the rollout workers said, who score every episode as they end it."""
    reward = result.trajectory.reward
    if reward is None or not reward.valid:
        return None
    return Verdict(reward.accuracy, reward.more.get("judge_score"))
