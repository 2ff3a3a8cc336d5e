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

from vz_ray.env.task import AnswerType, Task
from vz_ray.env.trajectory import EpisodeStatus, Trajectory
from vz_ray.eval.benchmarks.aggregation import GRADE
from vz_ray.eval.eval_log import EvalResult
from vz_ray.rewards import numbers_equal, parse_choice, parse_number, parse_options
from vz_ray.rewards.answer_text import normalize_text, strip_wrapping
from vz_ray.rewards.math_answer import math_equal
from vz_ray.rewards.multiple_choice import LETTERS

_THOUGHT = re.compile(r"<think>.*?(?:</think>|$)", re.DOTALL)
_TAG = re.compile(r"</?(?:answer|think|video_zoom)>|<video_zoom>.*?(?:</video_zoom>|$)", re.DOTALL)
_CLAIM = re.compile(
    r"\b(?:answer|option|choice)\b(?:\s+(?:is|would be|should be))?\s*[:=]?\s*(.+)", re.IGNORECASE
)


class AnswerStatus(StrEnum):
    """How far an answer got."""

    PARSED = "read"
    UNPARSED = "unparsed"
    """There is an answer, and it states no option, number or whatever was asked for: wrong."""
    NO_ANSWER = "no_answer"
    """There is no answer: wrong."""
    UNJUDGED = "unjudged"
    """Nobody could say whether it is right: left out of every figure."""
    FAILED = "failed"
    """The episode could not be played: left out of every figure."""


EXCLUDED_STATUSES = (AnswerStatus.UNJUDGED, AnswerStatus.FAILED)


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """What an answer is worth.

    Attributes:
        status: How far it got.
        score: In `[0, 1]`; 0 unless it was read.
        answer: What was read, in the benchmark's own terms.
        detail: Whatever else the metric counts.
    """

    status: AnswerStatus
    score: float = 0.0
    answer: str = ""
    detail: Mapping[str, float] = field(default_factory=dict)


AnswerScorer = Callable[[Task, str], AnswerScore]
"""What a text that should state the answer is worth."""

UNPARSED_SCORE = AnswerScore(AnswerStatus.UNPARSED)


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """What a judge found: how right, in `[0, 1]`, and a grade from 0 to 5 if it gave one."""

    correctness: float
    grade: float | None = None


AnswerJudge = Callable[[EvalResult], JudgedAnswer | None]
"""Judges an open answer; None where it cannot."""


@dataclass(frozen=True, slots=True)
class ScoredResult:
    """A played question and what it is worth, read both ways."""

    result: EvalResult
    strict: AnswerScore
    lenient: AnswerScore

    @property
    def task(self) -> Task:
        return self.result.task


# -- reading ----------------------------------------------------------------------


def task_options(task: Task) -> dict[str, str]:
    """Options by letter: those that the adapter knows, else those written in the question."""
    known = task.extra.get("options")
    return (
        {str(k): str(v) for k, v in known.items()}
        if isinstance(known, dict)
        else parse_options(task.question)
    )


def score_choice(task: Task, text: str) -> AnswerScore:
    """One of several options, by letter or by its text; an answer without letters, by its words."""
    options = task_options(task)
    if task.answer not in LETTERS:
        return score_words(task, text)
    # A truth that is no option's letter: the options could not be read, so letters are all there is.
    letter = parse_choice(text, options if task.answer in options else {})
    return (
        UNPARSED_SCORE
        if letter is None
        else AnswerScore(AnswerStatus.PARSED, float(letter == task.answer), letter)
    )


def score_words(task: Task, text: str) -> AnswerScore:
    """The same words, apart from case, spaces and what stands around an answer."""
    said = normalize_text(strip_wrapping(text))
    return (
        AnswerScore(AnswerStatus.PARSED, float(said == normalize_text(strip_wrapping(task.answer))), said)
        if said
        else UNPARSED_SCORE
    )


def score_number(task: Task, text: str) -> AnswerScore:
    """The same number or formula."""
    if parse_number(task.answer) is None:
        right = math_equal(text, task.answer)
    else:
        right = numbers_equal(text, task.answer)
    return (
        UNPARSED_SCORE if right is None else AnswerScore(AnswerStatus.PARSED, float(right), text.strip()[:80])
    )


def score_open(task: Task, text: str) -> AnswerScore:
    """A short open answer: the same number to two decimals, or the truth's words within the answer.

    Source: the open questions of MMMU and VideoMMMU; there the truth has to be
    part of what is answered, and here it has to be whole words of it.
    """
    truth = parse_number(task.answer)
    if truth is not None:
        number = parse_number(text)
        if number is None:
            return UNPARSED_SCORE
        return AnswerScore(
            AnswerStatus.PARSED, float(_rounded(number) == _rounded(truth)), str(float(number))
        )
    said, wanted = normalize_text(strip_wrapping(text)), normalize_text(task.answer)
    if not said:
        return UNPARSED_SCORE
    inside = re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", said) is not None
    return AnswerScore(AnswerStatus.PARSED, float(inside), said[:80])


def _rounded(number: Fraction) -> Fraction:
    return round(number * 100) / Fraction(100)


def score_by_type(task: Task, text: str) -> AnswerScore:
    """By the task's answer type. Not for answers that take a judge."""
    return score_number(task, text) if task.answer_type is AnswerType.NUMBER else score_choice(task, text)


# -- strict and lenient -----------------------------------------------------------


def last_turn_text(trajectory: Trajectory) -> str:
    """What the last turn says outside its reasoning, tags and calls taken off."""
    text = trajectory.turns[-1].text if trajectory.turns else ""
    return _TAG.sub("", _THOUGHT.sub("", text)).strip()


def candidate_answers(text: str) -> list[str]:
    """Parts of a text that may state its answer: what it calls the answer, its last line, all of it."""
    if not text:
        return []
    called = _CLAIM.findall(text)
    return [*(called[-1:]), text.split("\n")[-1], text]


def score_strictly(marker: AnswerScorer, task: Task, trajectory: Trajectory) -> AnswerScore:
    """The answer span alone."""
    if trajectory.status is EpisodeStatus.FAILED:
        return AnswerScore(AnswerStatus.FAILED)
    if trajectory.answer is None:
        return AnswerScore(AnswerStatus.NO_ANSWER)
    return marker(task, trajectory.answer)


def score_leniently(
    marker: AnswerScorer, strict: AnswerScore, task: Task, trajectory: Trajectory
) -> AnswerScore:
    """As `strict`, or what the last turn says where that cannot be read."""
    if strict.status not in (AnswerStatus.UNPARSED, AnswerStatus.NO_ANSWER):
        return strict
    found = (marker(task, claim) for claim in candidate_answers(last_turn_text(trajectory)))
    return next((mark for mark in found if mark.status is AnswerStatus.PARSED), strict)


def score_judged(result: EvalResult, judge: AnswerJudge) -> AnswerScore:
    """As a judge says; no answer is wrong without asking it."""
    if result.trajectory.status is EpisodeStatus.FAILED:
        return AnswerScore(AnswerStatus.FAILED)
    if result.trajectory.answer is None:
        return AnswerScore(AnswerStatus.NO_ANSWER, detail={GRADE: 0.0})
    verdict = judge(result)
    if verdict is None:
        return AnswerScore(AnswerStatus.UNJUDGED)
    detail = {} if verdict.grade is None else {GRADE: verdict.grade}
    return AnswerScore(AnswerStatus.PARSED, verdict.correctness, result.trajectory.answer[:80], detail)


def judge_from_reward(result: EvalResult) -> JudgedAnswer | None:
    """What the judge of the rollout workers said, who score every episode as they end it."""
    reward = result.trajectory.reward
    if reward is None or not reward.valid:
        return None
    return JudgedAnswer(reward.accuracy, reward.extra.get("judge_score"))
