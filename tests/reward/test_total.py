"""The sum over whole episodes, and what is not data."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vz_ray.config.reward import RewardConfig
from vz_ray.data.task import AnswerType, Task
from vz_ray.episode.trajectory import (
    Context,
    EpisodeId,
    Status,
    Trajectory,
    Turn,
    Written,
    ZoomFault,
    ZoomRefused,
)  # fmt: skip
from vz_ray.reward import NO_ANSWER, UNPARSED, score
from vz_ray.video.frame import Zoom

TASK = Task("t", "v.mp4", "What flashes? A. disc B. cross", "B")
ASK = '<think>Look.</think><video_zoom>{"segment": [1, 3], "fps": 2}</video_zoom>'
CLIP = Context((1,))
REFUSED = ZoomRefused(ZoomFault.REVERSED, "the segment ends before it starts")


def answer(text: str) -> str:
    return f"<think>Seen.</think><answer>{text}</answer>"


def play(said: str | None, *zooms: Zoom | ZoomRefused, status: Status = Status.ANSWERED) -> Trajectory:
    turns = [Turn(Written(ASK, ()), ASK, zoom, CLIP) for zoom in zooms]
    last = "<think>Hm.</think>" if said is None else answer(said)
    turns.append(Turn(Written(last, ()), last, None, None))
    return Trajectory(EpisodeId(0, "t", 0), "clean", CLIP, tuple(turns), status, answer=said)


GOOD = Zoom(1, 3, 2)


@pytest.mark.parametrize(
    ("trajectory", "clean", "compat"),
    [
        (play("B", GOOD), 1.5, 1.5),
        (play("B"), 1.0, 1.0),
        (play("(B)", GOOD), 1.5, 0.1),
        (play("B", REFUSED), 1.0, 1.5),
        (play("B", REFUSED, GOOD), 1.5, 1.5),
        (play("A", GOOD), 0.1, 0.1),
        (play("cannot tell", GOOD), 0.1, 0.1),
        (play(None, GOOD, status=Status.NO_ANSWER), 0.0, 0.0),
    ],
)
def test_the_papers_sum(trajectory: Trajectory, clean: float, compat: float) -> None:
    assert score(trajectory, TASK, RewardConfig()).total == pytest.approx(clean)
    assert score(trajectory, TASK, RewardConfig(scorer="compat")).total == pytest.approx(compat)


def test_parts_are_unweighted_and_weights_are_configurable() -> None:
    parts = score(play("B", GOOD), TASK, RewardConfig(accuracy=2.0, format=0.0, tool=1.0))
    assert (parts.accuracy, parts.format, parts.tool, parts.total, parts.valid) == (1.0, 1.0, 1.0, 3.0, True)


def test_an_unreadable_answer_is_wrong_and_noted() -> None:
    parts = score(play("disc or cross"), TASK, RewardConfig())
    assert parts.accuracy == 0
    assert parts.valid
    assert parts.note.startswith(UNPARSED)
    assert score(play("A"), TASK, RewardConfig()).note == ""


def test_numbers_and_formulas() -> None:
    count = replace(TASK, question="How often?", answer="3", answer_type=AnswerType.NUMBER)
    assert score(play("three times"), count, RewardConfig()).accuracy == 1
    assert score(play("4"), count, RewardConfig()).accuracy == 0
    formula = replace(count, answer="$x+x$")
    assert score(play("$2x$"), formula, RewardConfig()).accuracy == 1


def test_a_number_may_be_stated_as_a_formula() -> None:
    count = replace(TASK, question="How often?", answer="3", answer_type=AnswerType.NUMBER)
    assert score(play(r"$\sqrt{9}$"), count, RewardConfig()).accuracy == 1
    assert score(play("x = 4"), count, RewardConfig()).accuracy == 0
    unread = score(play("3 or 4"), count, RewardConfig())
    assert (unread.accuracy, unread.valid, unread.reason) == (0, True, UNPARSED)


@pytest.mark.parametrize(
    ("truth", "kind", "reason"),
    [
        ("", AnswerType.MULTIPLE_CHOICE, "no ground truth"),
        (" ", AnswerType.OPEN_ENDED, "no ground truth"),
        ("$$", AnswerType.NUMBER, "unreadable ground truth"),
    ],
)
def test_a_truth_that_cannot_be_used_is_not_the_policys_fault(
    truth: str, kind: AnswerType, reason: str
) -> None:
    for scorer in ("clean", "compat"):
        parts = score(play("B"), replace(TASK, answer=truth, answer_type=kind), RewardConfig(scorer=scorer))
        assert (parts.valid, parts.reason) == (False, reason)


def test_an_empty_answer_is_unreadable_and_none_is_none() -> None:
    for kind in AnswerType:
        task = replace(TASK, answer_type=kind, answer="3" if kind is AnswerType.NUMBER else "B")
        empty, none = (score(play(said), task, RewardConfig()) for said in (" ", None))
        assert (empty.valid, empty.accuracy, empty.reason) == (True, 0, UNPARSED)
        assert (none.valid, none.accuracy, none.reason) == (True, 0, NO_ANSWER)


def test_a_failed_episode_and_an_unjudged_question_are_invalid() -> None:
    failed = replace(play("B"), status=Status.FAILED, error="worker died")
    parts = score(failed, TASK, RewardConfig())
    assert not parts.valid
    assert "worker died" in parts.note
    parts = score(play("a dog"), replace(TASK, answer_type=AnswerType.OPEN_ENDED), RewardConfig())
    assert not parts.valid
    assert "judge" in parts.note


@pytest.mark.parametrize(
    "values",
    [{"accuracy": -1.0}, {"tool": float("nan")}, {"scorer": "strict"}, {"max_zoom_frames": 0}],
)
def test_a_wrong_value_is_named(values: dict[str, float]) -> None:
    (key,) = values
    with pytest.raises(ValueError, match=f"reward.{key}"):
        RewardConfig(**values)  # type: ignore[arg-type]
