"""Failure modes and their boundaries on hand-made episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from tests.eval.conftest import MakeResult, frames_at
from vz_ray.env.failure_modes import FailureMode, overlaps
from vz_ray.env.task import Task
from vz_ray.env.trajectory import (
    EpisodeId,
    EpisodeStatus,
    ExternalAction,
    RejectedZoom,
    TokenContext,
    Trajectory,
    Turn,
    ZoomErrorKind,
)
from vz_ray.eval.failure_counts import classify_failure, classify_result, count_failures
from vz_ray.needle.needle_video import QuestionKind, make_video
from vz_ray.rewards import UNPARSED_NOTE
from vz_ray.video.frame import ZoomRequest

EVENT = (12.5, 14.0)
OVERVIEW = (0.0, 10.0, 20.0, 30.0)


@dataclass(frozen=True)
class ShownClip:
    """A successful zoom and its frame times."""

    zoom: ZoomRequest
    times: Sequence[float]


def show_clip(start: float, end: float, *times: float) -> ShownClip:
    return ShownClip(ZoomRequest(start, end, max(1, len(times)) / (end - start)), times)


HIT = show_clip(12, 16, 12, 13, 14, 15)
COARSE = show_clip(12, 16, 12, 14)
AWAY = show_clip(20, 24, 20, 22)


def reject(kind: ZoomErrorKind) -> RejectedZoom:
    return RejectedZoom(kind, "no")


def make_episode(
    *zooms: ShownClip | RejectedZoom,
    status: EpisodeStatus = EpisodeStatus.ANSWERED,
    last: ZoomRequest | RejectedZoom | None = None,
    overview: Sequence[float] = OVERVIEW,
) -> Trajectory:
    turns = [
        Turn(ExternalAction("z", ()), "z", zoom.zoom, frames_at(zoom.times))
        if isinstance(zoom, ShownClip)
        else Turn(ExternalAction("z", ()), "z", zoom, TokenContext((3,)))
        for zoom in zooms
    ]
    turns.append(Turn(ExternalAction("a", ()), "a", last, None))
    answer = "A" if status is EpisodeStatus.ANSWERED else None
    return Trajectory(EpisodeId(0, "t", 0), "clean", frames_at(overview), tuple(turns), status, answer)


def classify(trajectory: Trajectory, *events: tuple[float, float], unparsed: bool = False) -> FailureMode | None:
    task = Task("t", "v.mp4", "?", "A", evidence_spans=events)
    return classify_failure(task, trajectory, correct=False, unparsed=unparsed)


@pytest.mark.parametrize(
    ("trajectory", "failure"),
    [
        (make_episode(), FailureMode.NEVER_ZOOMED),
        (make_episode(AWAY), FailureMode.ZOOMED_ELSEWHERE),
        (make_episode(COARSE), FailureMode.TOO_COARSE),
        (make_episode(HIT), FailureMode.WRONG_ANSWER),
        (make_episode(AWAY, COARSE), FailureMode.TOO_COARSE),
        (make_episode(AWAY, COARSE, HIT), FailureMode.WRONG_ANSWER),
        (make_episode(overview=(0, 13, 26)), FailureMode.WRONG_ANSWER),
        (make_episode(AWAY, overview=(0, 13, 26)), FailureMode.WRONG_ANSWER),
        (make_episode(status=EpisodeStatus.NO_ANSWER), FailureMode.BAD_FORMAT),
        (make_episode(HIT, status=EpisodeStatus.NO_ANSWER), FailureMode.BAD_FORMAT),
        (
            make_episode(HIT, status=EpisodeStatus.NO_ANSWER, last=reject(ZoomErrorKind.LAST_ROUND)),
            FailureMode.RAN_OUT_OF_ROUNDS,
        ),
        (
            make_episode(status=EpisodeStatus.NO_ANSWER, last=reject(ZoomErrorKind.INVALID_JSON)),
            FailureMode.RAN_OUT_OF_ROUNDS,
        ),
        (make_episode(HIT, status=EpisodeStatus.TRUNCATED), FailureMode.TRUNCATED),
        (
            make_episode(status=EpisodeStatus.TRUNCATED, last=reject(ZoomErrorKind.BUDGET_EXCEEDED)),
            FailureMode.TRUNCATED,
        ),
        (make_episode(status=EpisodeStatus.FAILED), FailureMode.FAILED),
    ],
)
def test_failure_mode_with_known_evidence(trajectory: Trajectory, failure: FailureMode) -> None:
    assert classify(trajectory, EVENT) is failure


@pytest.mark.parametrize(
    ("trajectory", "failure"),
    [
        (make_episode(), FailureMode.NEVER_ZOOMED),
        (make_episode(AWAY), FailureMode.ZOOMED_LOCATION_UNKNOWN),
        (make_episode(HIT), FailureMode.ZOOMED_LOCATION_UNKNOWN),
        (make_episode(reject(ZoomErrorKind.REVERSED)), FailureMode.BAD_FORMAT),
        (make_episode(status=EpisodeStatus.NO_ANSWER), FailureMode.BAD_FORMAT),
        (
            make_episode(HIT, status=EpisodeStatus.NO_ANSWER, last=reject(ZoomErrorKind.LAST_ROUND)),
            FailureMode.RAN_OUT_OF_ROUNDS,
        ),
        (make_episode(HIT, status=EpisodeStatus.TRUNCATED), FailureMode.TRUNCATED),
        (make_episode(status=EpisodeStatus.FAILED), FailureMode.FAILED),
    ],
)
def test_failure_mode_without_evidence_spans(trajectory: Trajectory, failure: FailureMode) -> None:
    assert classify(trajectory) is failure


MALFORMED = [
    kind
    for kind in ZoomErrorKind
    if kind not in (ZoomErrorKind.BUDGET_EXCEEDED, ZoomErrorKind.DECODE_ERROR, ZoomErrorKind.LAST_ROUND)
]


@pytest.mark.parametrize("kind", MALFORMED)
def test_only_malformed_calls_are_bad_format(kind: ZoomErrorKind) -> None:
    assert classify(make_episode(reject(kind), reject(kind)), EVENT) is FailureMode.BAD_FORMAT
    corrected = make_episode(reject(kind), COARSE)
    assert classify(corrected, EVENT) is FailureMode.TOO_COARSE


@pytest.mark.parametrize("kind", [ZoomErrorKind.BUDGET_EXCEEDED, ZoomErrorKind.DECODE_ERROR])
def test_rejected_valid_calls_count_as_never_zoomed(kind: ZoomErrorKind) -> None:
    assert classify(make_episode(reject(kind)), EVENT) is FailureMode.NEVER_ZOOMED
    two_rejections = make_episode(reject(ZoomErrorKind.REVERSED), reject(kind))
    assert classify(two_rejections, EVENT) is FailureMode.NEVER_ZOOMED


def test_unparsed_answer_is_bad_format_for_any_zooms() -> None:
    for trajectory in (make_episode(), make_episode(AWAY), make_episode(HIT), make_episode(COARSE)):
        assert classify(trajectory, EVENT, unparsed=True) is FailureMode.BAD_FORMAT


@pytest.mark.parametrize(
    ("clips", "failure"),
    [
        # The second event begins at 40 s.
        ((HIT,), FailureMode.ZOOMED_ELSEWHERE),
        ((HIT, show_clip(39, 43, 39, 41.5)), FailureMode.TOO_COARSE),
        ((HIT, show_clip(39, 43, 39, 40.5)), FailureMode.WRONG_ANSWER),
        ((COARSE, show_clip(39, 43, 39, 40.5)), FailureMode.TOO_COARSE),
        ((COARSE, AWAY), FailureMode.ZOOMED_ELSEWHERE),
        ((show_clip(0, 60, 0, 20, 50),), FailureMode.TOO_COARSE),
    ],
)
def test_failure_mode_with_two_events(clips: tuple[ShownClip, ...], failure: FailureMode) -> None:
    """All events must be visible; zooming elsewhere takes precedence over a clip that is too coarse."""
    assert classify(make_episode(*clips), EVENT, (40.0, 41.0)) is failure


@pytest.mark.parametrize(
    ("clip", "failure"),
    [
        (show_clip(10, 12.5, 10, 11), FailureMode.ZOOMED_ELSEWHERE),  # ends where the event begins
        (show_clip(10, 12.6, 10, 11), FailureMode.TOO_COARSE),
        (show_clip(14, 18, 14, 16), FailureMode.ZOOMED_ELSEWHERE),  # begins where the event ends
        (show_clip(13.9, 18, 14, 16), FailureMode.TOO_COARSE),
        (show_clip(12, 18, 12.5), FailureMode.WRONG_ANSWER),  # the start is inclusive
        (show_clip(12, 18, 14.0), FailureMode.TOO_COARSE),  # the end is exclusive
        (show_clip(12, 18, 13.99), FailureMode.WRONG_ANSWER),
    ],
)
def test_failure_mode_at_event_boundaries(clip: ShownClip, failure: FailureMode) -> None:
    assert classify(make_episode(clip), EVENT) is failure


@pytest.mark.parametrize(
    ("segment", "inside"), [((10, 12), True), ((12, 14), True), ((12.1, 14), False), ((10, 11.9), False)]
)
def test_event_of_zero_length_is_an_instant(segment: tuple[float, float], inside: bool) -> None:
    assert overlaps(segment, (12.0, 12.0)) is inside


def test_correct_episode_has_no_failure_mode() -> None:
    task = Task("t", "v.mp4", "?", "A", evidence_spans=(EVENT,))
    for trajectory in (make_episode(), make_episode(AWAY), make_episode(reject(ZoomErrorKind.REVERSED))):
        assert classify_failure(task, trajectory, correct=True) is None
    assert classify_failure(task, make_episode(status=EpisodeStatus.FAILED), correct=True) is FailureMode.FAILED


@pytest.mark.parametrize("seed", range(20))
def test_oracle_zooms_show_the_evidence_of_needle_questions(seed: int) -> None:
    """Eight frames of the oracle's segment show every event; frames outside the events are too coarse."""
    for question in make_video(seed, 64.0, (QuestionKind.IDENTIFY, QuestionKind.COUNT, QuestionKind.DEEP)).questions:
        task = Task("t", "v.mp4", question.text, question.answer, evidence_spans=question.evidence_spans)
        start, end = question.zoom_path[-1]
        slot = (end - start) / 8
        evidence = show_clip(start, end, *(start + (k + 0.5) * slot for k in range(8)))
        assert classify(make_episode(evidence, overview=()), *task.evidence_spans) is FailureMode.WRONG_ANSWER
        other_times = [t for t in evidence.times if not any(a <= t < b for a, b in task.evidence_spans)]
        coarse = show_clip(start, end, *other_times)
        assert classify(make_episode(coarse, overview=()), *task.evidence_spans) is FailureMode.TOO_COARSE
        away = show_clip(end % 60, end % 60 + 4, end % 60)
        if not any(overlaps((away.zoom.start_s, away.zoom.end_s), event) for event in task.evidence_spans):
            failure = classify(make_episode(away, overview=()), *task.evidence_spans)
            assert failure is FailureMode.ZOOMED_ELSEWHERE


def test_count_failures_ignores_results_that_were_not_judged(make_result: MakeResult) -> None:
    results = [
        make_result("a"),
        make_result("b", correct=False, zooms=()),
        make_result("c", correct=False, zooms=((12.0,),)),
        make_result("d", correct=False, note=f"{UNPARSED_NOTE}: 'x'"),
        make_result("e", valid=False, note="judge timeout: late"),
        make_result("f", valid=False, status=EpisodeStatus.FAILED),
        make_result("g", correct=False, zooms=(), events=()),
    ]
    assert [classify_result(result) for result in results][4] is None
    counts = count_failures(results)
    assert list(counts) == [failure.value for failure in FailureMode]
    assert {name: count for name, count in counts.items() if count} == {
        "never_zoomed": 2, "right_place_too_coarse": 1, "bad_format": 1, "failed": 1,
    }  # fmt: skip


def test_partial_credit_is_a_wrong_answer(make_result: MakeResult) -> None:
    result = make_result("a")
    assert result.trajectory.reward is not None
    reward = replace(result.trajectory.reward, accuracy=0.7)
    partly_correct = replace(result, trajectory=replace(result.trajectory, reward=reward))
    assert classify_result(partly_correct) is FailureMode.WRONG_ANSWER
