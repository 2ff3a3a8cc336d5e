"""How right an answer is: which scorer reads which kind of answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vz_ray.config.reward import RewardConfig
from vz_ray.data.task import AnswerType, Task
from vz_ray.episode.trajectory import JUDGE_FAILED
from vz_ray.reward.choice import choice_clean, choice_compat, options_of
from vz_ray.reward.judge import JudgeFailed, judge_of
from vz_ray.reward.math_answer import UnreadableTruth, looks_like_formula, math_equal
from vz_ray.reward.number import number_equal, parse_number
from vz_ray.reward.verdict import Form

NO_JUDGE = "no judge"
"""The reason where one would have been needed and none is configured."""
FORMS = {AnswerType.OPEN_ENDED: Form.BINARY, AnswerType.GRADED: Form.GRADED}
"""How a judge replies to answers that it compares with the truth."""
JUDGED = (*FORMS, AnswerType.CAPTION)
"""Answers that take a judge."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """What a scorer found.

    Attributes:
        value: In `[0, 1]`; of a caption, the share of its questions that it answers rightly.
        readable: False where there is an answer, and it states no option, number or formula.
        invalid: Why nobody can tell; empty if somebody can.
        more: Further parts: `judge_score`, 0 to 5; of a caption, the mean over its questions.
    """

    value: float = 0.0
    readable: bool = True
    invalid: str = ""
    more: Mapping[str, float] = field(default_factory=dict)


def accuracy_of(answer: str | None, turns: Sequence[str], task: Task, config: RewardConfig) -> Accuracy:
    """How right `answer` is.

    Args:
        answer: Content of the answer span; None if there is none, which is wrong.
        turns: What the policy said; `compat` looks there for an answer without a span.
        task: The question and its truth.
        config: The scorers.
    """
    if not task.answer.strip() and not task.checks:
        return Accuracy(invalid="no ground truth: the task's answer is empty")
    if task.answer_type is AnswerType.MULTIPLE_CHOICE and config.scorer == "compat":
        return _found(choice_compat("\n".join(turns), task.answer))
    if answer is None:
        return Accuracy()
    if not answer.strip():
        return Accuracy(readable=False)
    if task.answer_type in JUDGED:
        return _judged(answer, task, config)
    if task.answer_type is AnswerType.MULTIPLE_CHOICE:
        return _found(choice_clean(answer, task.answer, options_of(task.question)))
    try:
        return _found(_number(answer, task.answer, config.number_rel_tol))
    except UnreadableTruth as error:
        return Accuracy(invalid=f"unreadable ground truth: {error}")


def _found(right: bool | None) -> Accuracy:
    return Accuracy(float(right is True), readable=right is not None)


def _number(answer: str, truth: str, rel_tol: float) -> bool | None:
    if parse_number(truth) is None:
        return math_equal(answer, truth)
    if parse_number(answer) is None and looks_like_formula(answer):
        return math_equal(answer, truth)
    return number_equal(answer, truth, rel_tol)


def _judged(answer: str, task: Task, config: RewardConfig) -> Accuracy:
    if not config.judge.model:
        return Accuracy(invalid=f"{NO_JUDGE}: {task.answer_type} answers need reward.judge.model")
    try:
        judge = judge_of(config.judge)
        if task.answer_type is AnswerType.CAPTION:
            verdicts = judge.examine(answer, task.checks)
        else:
            verdicts = [judge.verdict(FORMS[task.answer_type], task.question, task.answer, answer)]
    except JudgeFailed as error:
        return Accuracy(invalid=f"{JUDGE_FAILED} {error}")
    if not verdicts:
        return Accuracy(invalid="no ground truth: the task asks nothing of the caption")
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    more = {"judge_score": sum(scores) / len(scores)} if scores else {}
    return Accuracy(sum(verdict.right for verdict in verdicts) / len(verdicts), more=more)
