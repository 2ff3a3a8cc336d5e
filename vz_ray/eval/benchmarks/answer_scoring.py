"""Scoring of one answer: strict from the answer span, lenient also from the last turn.

Strict scoring parses the answer span only. If the span is missing or cannot be parsed,
lenient scoring parses the last turn without its reasoning. Neither guesses: an answer
that cannot be parsed is wrong, and counted.
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
_ANSWER_STATEMENT = re.compile(
    r"\b(?:answer|option|choice)\b(?:\s+(?:is|would be|should be))?\s*[:=]?\s*(.+)", re.IGNORECASE
)
_MAX_ANSWER_CHARS = 80


class AnswerStatus(StrEnum):
    """Outcome of parsing or judging an answer."""

    PARSED = "parsed"
    UNPARSED = "unparsed"
    """The answer has no option, number or other expected content: wrong."""
    NO_ANSWER = "no_answer"
    """The episode has no answer: wrong."""
    UNJUDGED = "unjudged"
    """The judge gave no verdict: excluded from all metrics."""
    FAILED = "failed"
    """The episode failed: excluded from all metrics."""


EXCLUDED_STATUSES = (AnswerStatus.UNJUDGED, AnswerStatus.FAILED)


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """Score of one answer.

    Attributes:
        status: Outcome of parsing or judging.
        score: In `[0, 1]`; 0 unless the answer was parsed.
        answer: The parsed answer in the benchmark's own terms.
        detail: Further values that the metric needs.
    """

    status: AnswerStatus
    score: float = 0.0
    answer: str = ""
    detail: Mapping[str, float] = field(default_factory=dict)


AnswerScorer = Callable[[Task, str], AnswerScore]
"""Scores a text that should contain the answer."""

UNPARSED_SCORE = AnswerScore(AnswerStatus.UNPARSED)


@dataclass(frozen=True, slots=True)
class ScoredResult:
    """A result with its strict and lenient scores."""

    result: EvalResult
    strict: AnswerScore
    lenient: AnswerScore

    @property
    def task(self) -> Task:
        return self.result.task


# -- parsing ----------------------------------------------------------------------


def task_options(task: Task) -> dict[str, str]:
    """Return options by letter, from the adapter or else parsed from the question."""
    options = task.extra.get("options")
    if isinstance(options, dict):
        return {str(letter): str(text) for letter, text in options.items()}
    return parse_options(task.question)


def score_choice(task: Task, text: str) -> AnswerScore:
    """Score a multiple-choice answer by letter or option text; by its words if the reference is not a letter."""
    options = task_options(task)
    if task.answer not in LETTERS:
        return score_words(task, text)
    # If the reference letter has no option, the options could not be parsed: accept letters only.
    letter = parse_choice(text, options if task.answer in options else {})
    if letter is None:
        return UNPARSED_SCORE
    return AnswerScore(AnswerStatus.PARSED, float(letter == task.answer), letter)


def score_words(task: Task, text: str) -> AnswerScore:
    """Score by exact match after normalizing case, spaces and wrapping."""
    answer = normalize_text(strip_wrapping(text))
    if not answer:
        return UNPARSED_SCORE
    reference = normalize_text(strip_wrapping(task.answer))
    return AnswerScore(AnswerStatus.PARSED, float(answer == reference), answer)


def score_number(task: Task, text: str) -> AnswerScore:
    """Score a number or formula by value."""
    correct = math_equal(text, task.answer) if parse_number(task.answer) is None else numbers_equal(text, task.answer)
    if correct is None:
        return UNPARSED_SCORE
    return AnswerScore(AnswerStatus.PARSED, float(correct), text.strip()[:_MAX_ANSWER_CHARS])


def score_open(task: Task, text: str) -> AnswerScore:
    """Score a short open answer: equal numbers to two decimals, or the reference within the answer.

    Source: the open questions of MMMU and VideoMMMU. They accept any substring; this function requires
    whole words.
    """
    reference_number = parse_number(task.answer)
    if reference_number is not None:
        number = parse_number(text)
        if number is None:
            return UNPARSED_SCORE
        correct = _round(number) == _round(reference_number)
        return AnswerScore(AnswerStatus.PARSED, float(correct), str(float(number)))
    answer, reference = normalize_text(strip_wrapping(text)), normalize_text(task.answer)
    if not answer:
        return UNPARSED_SCORE
    contained = re.search(rf"(?<!\w){re.escape(reference)}(?!\w)", answer) is not None
    return AnswerScore(AnswerStatus.PARSED, float(contained), answer[:_MAX_ANSWER_CHARS])


def _round(number: Fraction) -> Fraction:
    return round(number * 100) / Fraction(100)


def score_by_type(task: Task, text: str) -> AnswerScore:
    """Score by the task's answer type. Not for answer types that need a judge."""
    return score_number(task, text) if task.answer_type is AnswerType.NUMBER else score_choice(task, text)


# -- strict and lenient -----------------------------------------------------------


def last_turn_text(trajectory: Trajectory) -> str:
    """Return the text of the last turn without reasoning, tags and zoom calls."""
    text = trajectory.turns[-1].text if trajectory.turns else ""
    return _TAG.sub("", _THOUGHT.sub("", text)).strip()


def candidate_answers(text: str) -> list[str]:
    """Return candidates in order: the last stated answer, the last line, the whole text."""
    if not text:
        return []
    statements = _ANSWER_STATEMENT.findall(text)
    return [*(statements[-1:]), text.split("\n")[-1], text]


def score_strictly(scorer: AnswerScorer, task: Task, trajectory: Trajectory) -> AnswerScore:
    """Score the answer span."""
    if trajectory.status is EpisodeStatus.FAILED:
        return AnswerScore(AnswerStatus.FAILED)
    if trajectory.answer is None:
        return AnswerScore(AnswerStatus.NO_ANSWER)
    return scorer(task, trajectory.answer)


def score_leniently(scorer: AnswerScorer, strict: AnswerScore, task: Task, trajectory: Trajectory) -> AnswerScore:
    """Return `strict` if it is parsed, else the score of the first candidate of the last turn that parses."""
    if strict.status not in (AnswerStatus.UNPARSED, AnswerStatus.NO_ANSWER):
        return strict
    scores = (scorer(task, candidate) for candidate in candidate_answers(last_turn_text(trajectory)))
    return next((score for score in scores if score.status is AnswerStatus.PARSED), strict)


def score_judged(trajectory: Trajectory) -> AnswerScore:
    """Score by the judge's verdict, which the rollout worker stored in the reward at the end of the episode.

    A missing answer is wrong without a verdict.
    """
    if trajectory.status is EpisodeStatus.FAILED:
        return AnswerScore(AnswerStatus.FAILED)
    if trajectory.answer is None:
        return AnswerScore(AnswerStatus.NO_ANSWER, detail={GRADE: 0.0})
    reward = trajectory.reward
    if reward is None or not reward.valid:
        return AnswerScore(AnswerStatus.UNJUDGED)
    detail = {GRADE: reward.extra["judge_score"]} if "judge_score" in reward.extra else {}
    return AnswerScore(AnswerStatus.PARSED, reward.accuracy, trajectory.answer[:_MAX_ANSWER_CHARS], detail)
