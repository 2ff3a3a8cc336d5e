"""How right an answer is: which scorer reads which kind of answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vz_ray.config.reward import RewardConfig
from vz_ray.env.task import AnswerType, Task
from vz_ray.env.trajectory import JUDGE_FAILED_NOTE
from vz_ray.rewards.judge import JudgeError, get_judge
from vz_ray.rewards.judge_protocol import JudgeForm
from vz_ray.rewards.math_answer import UnparsableTruthError, looks_like_formula, math_equal
from vz_ray.rewards.multiple_choice import choice_correct, choice_correct_compat, parse_options
from vz_ray.rewards.numeric import numbers_equal, parse_number

NO_JUDGE = "no judge"
"""The reason where one would have been needed and none is configured."""
JUDGE_FORMS = {AnswerType.OPEN_ENDED: JudgeForm.BINARY, AnswerType.GRADED: JudgeForm.GRADED}
"""How a judge replies to answers that it compares with the truth."""
JUDGED_ANSWER_TYPES = (*JUDGE_FORMS, AnswerType.CAPTION)
"""Answers that take a judge."""


@dataclass(frozen=True, slots=True)
class AccuracyResult:
    """What a scorer found.

    Attributes:
        value: In `[0, 1]`; of a caption, the share of its questions that it answers rightly.
        parsed: False where there is an answer, and it states no option, number or formula.
        invalid_reason: Why nobody can tell; empty if somebody can.
        extra_parts: Further parts: `judge_score`, 0 to 5; of a caption, the mean over its questions.
    """

    value: float = 0.0
    parsed: bool = True
    invalid_reason: str = ""
    extra_parts: Mapping[str, float] = field(default_factory=dict)


def score_accuracy(
    answer: str | None, turns: Sequence[str], task: Task, config: RewardConfig
) -> AccuracyResult:
    """How right `answer` is.

    Args:
        answer: Content of the answer span; None if there is none, which is wrong.
        turns: What the policy said; `compat` looks there for an answer without a span.
        task: The question and its truth.
        config: The scorers.
    """
    if not task.answer.strip() and not task.caption_questions:
        return AccuracyResult(invalid_reason="no ground truth: the task's answer is empty")
    if task.answer_type is AnswerType.MULTIPLE_CHOICE and config.scorer == "compat":
        return _found(choice_correct_compat("\n".join(turns), task.answer))
    if answer is None:
        return AccuracyResult()
    if not answer.strip():
        return AccuracyResult(parsed=False)
    if task.answer_type in JUDGED_ANSWER_TYPES:
        return _judged(answer, task, config)
    if task.answer_type is AnswerType.MULTIPLE_CHOICE:
        return _found(choice_correct(answer, task.answer, parse_options(task.question)))
    try:
        return _found(_number(answer, task.answer, config.number_rel_tol))
    except UnparsableTruthError as error:
        return AccuracyResult(invalid_reason=f"unreadable ground truth: {error}")


def _found(right: bool | None) -> AccuracyResult:
    return AccuracyResult(float(right is True), parsed=right is not None)


def _number(answer: str, truth: str, rel_tol: float) -> bool | None:
    if parse_number(truth) is None:
        return math_equal(answer, truth)
    if parse_number(answer) is None and looks_like_formula(answer):
        return math_equal(answer, truth)
    return numbers_equal(answer, truth, rel_tol)


def _judged(answer: str, task: Task, config: RewardConfig) -> AccuracyResult:
    if not config.judge.model:
        return AccuracyResult(
            invalid_reason=f"{NO_JUDGE}: {task.answer_type} answers need reward.judge.model"
        )
    try:
        judge = get_judge(config.judge)
        if task.answer_type is AnswerType.CAPTION:
            verdicts = judge.judge_caption(answer, task.caption_questions)
        else:
            verdicts = [judge.judge_answer(JUDGE_FORMS[task.answer_type], task.question, task.answer, answer)]
    except JudgeError as error:
        return AccuracyResult(invalid_reason=f"{JUDGE_FAILED_NOTE} {error}")
    if not verdicts:
        return AccuracyResult(invalid_reason="no ground truth: the task asks nothing of the caption")
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    more = {"judge_score": sum(scores) / len(scores)} if scores else {}
    return AccuracyResult(sum(verdict.correct for verdict in verdicts) / len(verdicts), extra_parts=more)
