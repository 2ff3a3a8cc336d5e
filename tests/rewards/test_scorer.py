"""Total reward of whole episodes, and invalid episodes."""

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
ZOOM_TURN = '<think>Look.</think><video_zoom>{"segment": [1, 3], "fps": 2}</video_zoom>'
CLIP = TokenContext((1,))
REJECTED = RejectedZoom(ZoomErrorKind.REVERSED, "the segment ends before it starts")


def answer_turn(text: str) -> str:
    return f"<think>Seen.</think><answer>{text}</answer>"


def make_trajectory(
    answer_text: str | None,
    *zooms: ZoomRequest | RejectedZoom,
    status: EpisodeStatus = EpisodeStatus.ANSWERED,
) -> Trajectory:
    turns = [Turn(ExternalAction(ZOOM_TURN, ()), ZOOM_TURN, zoom, CLIP) for zoom in zooms]
    last = "<think>Hm.</think>" if answer_text is None else answer_turn(answer_text)
    turns.append(Turn(ExternalAction(last, ()), last, None, None))
    return Trajectory(EpisodeId(0, "t", 0), "clean", CLIP, tuple(turns), status, answer=answer_text)


GOOD = ZoomRequest(1, 3, 2)


@pytest.mark.parametrize(
    ("trajectory", "clean", "compat"),
    [
        (make_trajectory("B", GOOD), 1.5, 1.5),
        (make_trajectory("B"), 1.0, 1.0),
        (make_trajectory("(B)", GOOD), 1.5, 0.1),
        (make_trajectory("B", REJECTED), 1.0, 1.5),
        (make_trajectory("B", REJECTED, GOOD), 1.5, 1.5),
        (make_trajectory("A", GOOD), 0.1, 0.1),
        (make_trajectory("cannot tell", GOOD), 0.1, 0.1),
        (make_trajectory(None, GOOD, status=EpisodeStatus.NO_ANSWER), 0.0, 0.0),
    ],
)
def test_total_reward_of_paper(trajectory: Trajectory, clean: float, compat: float) -> None:
    assert score_episode(trajectory, TASK, RewardConfig()).total == pytest.approx(clean)
    assert score_episode(trajectory, TASK, RewardConfig(scorer="compat")).total == pytest.approx(compat)


def test_parts_are_unweighted_and_weights_are_configurable() -> None:
    parts = score_episode(make_trajectory("B", GOOD), TASK, RewardConfig(accuracy=2.0, format=0.0, tool=1.0))
    assert (parts.accuracy, parts.format, parts.tool, parts.total, parts.valid) == (1.0, 1.0, 1.0, 3.0, True)


def test_unparsable_answer_scores_zero_with_note() -> None:
    parts = score_episode(make_trajectory("disc or cross"), TASK, RewardConfig())
    assert parts.accuracy == 0
    assert parts.valid
    assert parts.note.startswith(UNPARSED_NOTE)
    assert score_episode(make_trajectory("A"), TASK, RewardConfig()).note == ""


def test_number_and_formula_answers() -> None:
    count = replace(TASK, question="How often?", answer="3", answer_type=AnswerType.NUMBER)
    assert score_episode(make_trajectory("three times"), count, RewardConfig()).accuracy == 1
    assert score_episode(make_trajectory("4"), count, RewardConfig()).accuracy == 0
    formula = replace(count, answer="$x+x$")
    assert score_episode(make_trajectory("$2x$"), formula, RewardConfig()).accuracy == 1


def test_number_may_be_given_as_formula() -> None:
    count = replace(TASK, question="How often?", answer="3", answer_type=AnswerType.NUMBER)
    assert score_episode(make_trajectory(r"$\sqrt{9}$"), count, RewardConfig()).accuracy == 1
    assert score_episode(make_trajectory("x = 4"), count, RewardConfig()).accuracy == 0
    unparsed = score_episode(make_trajectory("3 or 4"), count, RewardConfig())
    assert (unparsed.accuracy, unparsed.valid, unparsed.reason) == (0, True, UNPARSED_NOTE)


@pytest.mark.parametrize(
    ("truth", "kind", "reason"),
    [
        ("", AnswerType.MULTIPLE_CHOICE, "no ground truth"),
        (" ", AnswerType.OPEN_ENDED, "no ground truth"),
        ("$$", AnswerType.NUMBER, "unreadable ground truth"),
    ],
)
def test_unusable_truth_invalidates_sample(truth: str, kind: AnswerType, reason: str) -> None:
    for scorer in ("clean", "compat"):
        parts = score_episode(
            make_trajectory("B"), replace(TASK, answer=truth, answer_type=kind), RewardConfig(scorer=scorer)
        )
        assert (parts.valid, parts.reason) == (False, reason)


def test_empty_answer_differs_from_missing_answer() -> None:
    for kind in AnswerType:
        task = replace(TASK, answer_type=kind, answer="3" if kind is AnswerType.NUMBER else "B")
        empty, none = (score_episode(make_trajectory(text), task, RewardConfig()) for text in (" ", None))
        assert (empty.valid, empty.accuracy, empty.reason) == (True, 0, UNPARSED_NOTE)
        assert (none.valid, none.accuracy, none.reason) == (True, 0, NO_ANSWER)


def test_failed_and_unjudged_episodes_are_invalid() -> None:
    failed = replace(make_trajectory("B"), status=EpisodeStatus.FAILED, error="worker died")
    parts = score_episode(failed, TASK, RewardConfig())
    assert not parts.valid
    assert "worker died" in parts.note
    parts = score_episode(make_trajectory("a dog"), replace(TASK, answer_type=AnswerType.OPEN_ENDED), RewardConfig())
    assert not parts.valid
    assert "judge" in parts.note


@pytest.mark.parametrize(
    "values",
    [{"accuracy": -1.0}, {"tool": float("nan")}, {"scorer": "strict"}, {"number_rel_tol": -0.1}],
)
def test_invalid_reward_config_is_rejected(values: dict[str, float]) -> None:
    (key,) = values
    with pytest.raises(ValueError, match=key):
        RewardConfig(**values)  # type: ignore[arg-type]
