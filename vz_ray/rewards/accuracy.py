"""Accuracy: select the scorer for a task's answer type and run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vz_ray.config.reward import RewardConfig
from vz_ray.env.task import AnswerType, Task
from vz_ray.env.trajectory import JUDGE_FAILED_NOTE
from vz_ray.rewards.judge import get_judge
from vz_ray.rewards.judge_protocol import JudgeForm
from vz_ray.rewards.math_answer import UnparsableTruthError, looks_like_formula, math_equal
from vz_ray.rewards.multiple_choice import choice_correct, choice_correct_compat, parse_options
from vz_ray.rewards.numeric import numbers_equal, parse_number
from vz_ray.utils.openai_endpoint import EndpointError

NO_JUDGE = "no judge"
"""Invalid reason if an answer needs a judge and the config has none."""
JUDGE_FORMS = {AnswerType.OPEN_ENDED: JudgeForm.BINARY, AnswerType.GRADED: JudgeForm.GRADED}
"""Form of the judge's verdict for answers that it compares with the ground truth."""
JUDGED_ANSWER_TYPES = (*JUDGE_FORMS, AnswerType.CAPTION)
"""Answer types that need a judge."""


@dataclass(frozen=True, slots=True)
class AccuracyResult:
    """Result of an accuracy scorer.

    Attributes:
        value: Accuracy in `[0, 1]`. For a caption: the share of its questions answered correctly.
        parsed: False if the answer contains no option, number or formula.
        invalid_reason: Reason why the answer cannot be scored; empty if it was scored.
        extra_parts: Additional parts: `judge_score`, 0 to 5; for a caption the mean over its questions.
    """

    value: float = 0.0
    parsed: bool = True
    invalid_reason: str = ""
    extra_parts: Mapping[str, float] = field(default_factory=dict)


def score_accuracy(answer: str | None, turns: Sequence[str], task: Task, config: RewardConfig) -> AccuracyResult:
    """Score `answer` against the ground truth of `task`.

    Args:
        answer: Content of the answer span; None if the span is missing, which scores 0.
        turns: Texts of the policy's turns; the `compat` scorer searches them if the span is missing.
        task: Question and ground truth.
        config: Scorer, tolerance and judge.
    """
    if not task.answer.strip() and not task.caption_questions:
        return AccuracyResult(invalid_reason="no ground truth: the task's answer is empty")
    if task.answer_type is AnswerType.MULTIPLE_CHOICE and config.scorer == "compat":
        return _to_result(choice_correct_compat("\n".join(turns), task.answer))
    if answer is None:
        return AccuracyResult()
    if not answer.strip():
        return AccuracyResult(parsed=False)
    if task.answer_type in JUDGED_ANSWER_TYPES:
        return _score_with_judge(answer, task, config)
    if task.answer_type is AnswerType.MULTIPLE_CHOICE:
        return _to_result(choice_correct(answer, task.answer, parse_options(task.question)))
    try:
        return _to_result(_number_correct(answer, task.answer, config.number_rel_tol))
    except UnparsableTruthError as error:
        return AccuracyResult(invalid_reason=f"unreadable ground truth: {error}")


def _to_result(correct: bool | None) -> AccuracyResult:
    return AccuracyResult(float(correct is True), parsed=correct is not None)


def _number_correct(answer: str, truth: str, rel_tol: float) -> bool | None:
    if parse_number(truth) is None:
        return math_equal(answer, truth)
    if parse_number(answer) is None and looks_like_formula(answer):
        return math_equal(answer, truth)
    return numbers_equal(answer, truth, rel_tol)


def _score_with_judge(answer: str, task: Task, config: RewardConfig) -> AccuracyResult:
    if not config.judge.model:
        return AccuracyResult(invalid_reason=f"{NO_JUDGE}: {task.answer_type} answers need reward.judge.model")
    try:
        judge = get_judge(config.judge)
        if task.answer_type is AnswerType.CAPTION:
            verdicts = judge.judge_caption(answer, task.caption_questions)
        else:
            verdicts = [judge.judge_answer(JUDGE_FORMS[task.answer_type], task.question, task.answer, answer)]
    except EndpointError as error:
        return AccuracyResult(invalid_reason=f"{JUDGE_FAILED_NOTE} {error}")
    if not verdicts:
        return AccuracyResult(invalid_reason="no ground truth: the task has no caption questions")
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    extra_parts = {"judge_score": sum(scores) / len(scores)} if scores else {}
    accuracy = sum(verdict.correct for verdict in verdicts) / len(verdicts)
    return AccuracyResult(accuracy, extra_parts=extra_parts)
