"""The sum over whole episodes, and what is not data."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vz_ray.config.reward import RewardConfig
from vz_ray.env.task import AnswerType, Task
from vz_ray.env.trajectory import (  # fmt: skip
    EpisodeId,
    EpisodeStatus,
    ExternalAction,
    RejectedZoom,
    TokenContext,
    Trajectory,
    Turn,
    ZoomErrorKind,
)
from vz_ray.rewards import NO_ANSWER, UNPARSED_NOTE, score_episode
from vz_ray.video.frame import ZoomRequest

TASK = Task("t", "v.mp4", "What flashes? A. disc B. cross", "B")
ASK = '<think>Look.</think><video_zoom>{"segment": [1, 3], "fps": 2}</video_zoom>'
CLIP = TokenContext((1,))
REFUSED = RejectedZoom(ZoomErrorKind.REVERSED, "the segment ends before it starts")


def answer(text: str) -> str:
    return f"<think>Seen.</think><answer>{text}</answer>"


def make_trajectory(
    said: str | None, *zooms: ZoomRequest | RejectedZoom, status: EpisodeStatus = EpisodeStatus.ANSWERED
) -> Trajectory:
    turns = [Turn(ExternalAction(ASK, ()), ASK, zoom, CLIP) for zoom in zooms]
    last = "<think>Hm.</think>" if said is None else answer(said)
    turns.append(Turn(ExternalAction(last, ()), last, None, None))
    return Trajectory(EpisodeId(0, "t", 0), "clean", CLIP, tuple(turns), status, answer=said)


GOOD = ZoomRequest(1, 3, 2)


@pytest.mark.parametrize(
    ("trajectory", "clean", "compat"),
    [
        (make_trajectory("B", GOOD), 1.5, 1.5),
        (make_trajectory("B"), 1.0, 1.0),
        (make_trajectory("(B)", GOOD), 1.5, 0.1),
        (make_trajectory("B", REFUSED), 1.0, 1.5),
        (make_trajectory("B", REFUSED, GOOD), 1.5, 1.5),
        (make_trajectory("A", GOOD), 0.1, 0.1),
        (make_trajectory("cannot tell", GOOD), 0.1, 0.1),
        (make_trajectory(None, GOOD, status=EpisodeStatus.NO_ANSWER), 0.0, 0.0),
    ],
)
def test_the_papers_sum(trajectory: Trajectory, clean: float, compat: float) -> None:
    assert score_episode(trajectory, TASK, RewardConfig()).total == pytest.approx(clean)
    assert score_episode(trajectory, TASK, RewardConfig(scorer="compat")).total == pytest.approx(compat)


def test_parts_are_unweighted_and_weights_are_configurable() -> None:
    parts = score_episode(make_trajectory("B", GOOD), TASK, RewardConfig(accuracy=2.0, format=0.0, tool=1.0))
    assert (parts.accuracy, parts.format, parts.tool, parts.total, parts.valid) == (1.0, 1.0, 1.0, 3.0, True)


def test_an_unreadable_answer_is_wrong_and_noted() -> None:
    parts = score_episode(make_trajectory("disc or cross"), TASK, RewardConfig())
    assert parts.accuracy == 0
    assert parts.valid
    assert parts.note.startswith(UNPARSED_NOTE)
    assert score_episode(make_trajectory("A"), TASK, RewardConfig()).note == ""


def test_numbers_and_formulas() -> None:
    count = replace(TASK, question="How often?", answer="3", answer_type=AnswerType.NUMBER)
    assert score_episode(make_trajectory("three times"), count, RewardConfig()).accuracy == 1
    assert score_episode(make_trajectory("4"), count, RewardConfig()).accuracy == 0
    formula = replace(count, answer="$x+x$")
    assert score_episode(make_trajectory("$2x$"), formula, RewardConfig()).accuracy == 1


def test_a_number_may_be_stated_as_a_formula() -> None:
    count = replace(TASK, question="How often?", answer="3", answer_type=AnswerType.NUMBER)
    assert score_episode(make_trajectory(r"$\sqrt{9}$"), count, RewardConfig()).accuracy == 1
    assert score_episode(make_trajectory("x = 4"), count, RewardConfig()).accuracy == 0
    unread = score_episode(make_trajectory("3 or 4"), count, RewardConfig())
    assert (unread.accuracy, unread.valid, unread.reason) == (0, True, UNPARSED_NOTE)


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
        parts = score_episode(
            make_trajectory("B"), replace(TASK, answer=truth, answer_type=kind), RewardConfig(scorer=scorer)
        )
        assert (parts.valid, parts.reason) == (False, reason)


def test_an_empty_answer_is_unreadable_and_none_is_none() -> None:
    for kind in AnswerType:
        task = replace(TASK, answer_type=kind, answer="3" if kind is AnswerType.NUMBER else "B")
        empty, none = (score_episode(make_trajectory(said), task, RewardConfig()) for said in (" ", None))
        assert (empty.valid, empty.accuracy, empty.reason) == (True, 0, UNPARSED_NOTE)
        assert (none.valid, none.accuracy, none.reason) == (True, 0, NO_ANSWER)


def test_a_failed_episode_and_an_unjudged_question_are_invalid() -> None:
    failed = replace(make_trajectory("B"), status=EpisodeStatus.FAILED, error="worker died")
    parts = score_episode(failed, TASK, RewardConfig())
    assert not parts.valid
    assert "worker died" in parts.note
    parts = score_episode(
        make_trajectory("a dog"), replace(TASK, answer_type=AnswerType.OPEN_ENDED), RewardConfig()
    )
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
