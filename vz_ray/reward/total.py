"""The sum: R = 0.9 accuracy + 0.1 format + 0.5 [accuracy = 1 and a zoom] (paper, section on rewards).

The only file of this room that knows `Trajectory` and `Task`; it takes plain
values out of them for the others.
"""

from __future__ import annotations

from vz_ray.config.reward import RewardConfig
from vz_ray.data.task import AnswerType, Task
from vz_ray.episode.trajectory import RewardParts, Status, Trajectory
from vz_ray.reward.choice import choice_clean, choice_compat, options_of
from vz_ray.reward.format import format_ok
from vz_ray.reward.math_answer import math_equal
from vz_ray.reward.number import number_equal, parse_number
from vz_ray.reward.tool import earned_tool

UNPARSED = "unparsed"
"""Start of the note on an answer span that states no option or number; it counts as wrong."""


def _invalid(note: str) -> RewardParts:
    return RewardParts(total=0.0, accuracy=0.0, format=0.0, tool=0.0, valid=False, note=note)


def _right(answer: str | None, turns: list[str], task: Task, config: RewardConfig) -> bool | None:
    """Whether the answer is right; None if there is an answer but it cannot be read."""
    if task.answer_type is AnswerType.MULTIPLE_CHOICE and config.scorer == "compat":
        return choice_compat("\n".join(turns), task.answer)
    if answer is None:
        return False
    if task.answer_type is AnswerType.MULTIPLE_CHOICE:
        return choice_clean(answer, task.answer, options_of(task.question))
    if parse_number(task.answer) is None:
        return math_equal(answer, task.answer)
    return number_equal(answer, task.answer, config.number_rel_tol)


def score(trajectory: Trajectory, task: Task, config: RewardConfig) -> RewardParts:
    """Scores an episode; the parts are 0 or 1, `total` is their weighted sum.

    A failed episode and a question that nobody here can judge are *invalid*:
    they drop their group and never count as 0.
    """
    if trajectory.status is Status.FAILED:
        return _invalid(f"failed: {trajectory.error}")
    if task.answer_type in (AnswerType.OPEN_ENDED, AnswerType.GRADED):
        return _invalid("no judge is configured for open-ended questions")
    turns = [turn.text for turn in trajectory.turns]
    right = _right(trajectory.answer, turns, task, config)
    accuracy = float(right is True)
    shaped = float(format_ok(turns, config.max_zoom_frames))
    zooms = trajectory.zooms_tried if config.scorer == "compat" else len(trajectory.zooms)
    tool = float(earned_tool(accuracy, zooms))
    note = ""
    if trajectory.answer is None:
        note = "no answer"
    elif right is None:
        note = f"{UNPARSED}: {trajectory.answer[:80]!r}"
    return RewardParts(
        total=config.accuracy * accuracy + config.format * shaped + config.tool * tool,
        accuracy=accuracy,
        format=shaped,
        tool=tool,
        note=note,
    )
