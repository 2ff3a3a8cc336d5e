"""Each class of failure, and its borders, on episodes made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from tests.eval.conftest import Make, frames_at
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
    """A zoom carried out, and the times of the frames that it showed."""

    zoom: ZoomRequest
    times: Sequence[float]


def show_clip(start: float, end: float, *times: float) -> ShownClip:
    return ShownClip(ZoomRequest(start, end, max(1, len(times)) / (end - start)), times)


HIT = show_clip(12, 16, 12, 13, 14, 15)
COARSE = show_clip(12, 16, 12, 14)
AWAY = show_clip(20, 24, 20, 22)


def refused(fault: ZoomErrorKind) -> RejectedZoom:
    return RejectedZoom(fault, "no")


def play(
    *asked: ShownClip | RejectedZoom,
    status: EpisodeStatus = EpisodeStatus.ANSWERED,
    last: ZoomRequest | RejectedZoom | None = None,
    overview: Sequence[float] = OVERVIEW,
) -> Trajectory:
    turns = [
        Turn(ExternalAction("z", ()), "z", a.zoom, frames_at(a.times))
        if isinstance(a, ShownClip)
        else Turn(ExternalAction("z", ()), "z", a, TokenContext((3,)))
        for a in asked
    ]
    turns.append(Turn(ExternalAction("a", ()), "a", last, None))
    answer = "A" if status is EpisodeStatus.ANSWERED else None
    return Trajectory(EpisodeId(0, "t", 0), "clean", frames_at(overview), tuple(turns), status, answer)


def why(played: Trajectory, *events: tuple[float, float], unparsed: bool = False) -> FailureMode | None:
    return classify_failure(
        Task("t", "v.mp4", "?", "A", evidence_spans=events), played, correct=False, unparsed=unparsed
    )


@pytest.mark.parametrize(
    ("played", "failure"),
    [
        (play(), FailureMode.NEVER_ZOOMED),
        (play(AWAY), FailureMode.ZOOMED_ELSEWHERE),
        (play(COARSE), FailureMode.TOO_COARSE),
        (play(HIT), FailureMode.WRONG_ANSWER),
        (play(AWAY, COARSE), FailureMode.TOO_COARSE),
        (play(AWAY, COARSE, HIT), FailureMode.WRONG_ANSWER),
        (play(overview=(0, 13, 26)), FailureMode.WRONG_ANSWER),
        (play(AWAY, overview=(0, 13, 26)), FailureMode.WRONG_ANSWER),
        (play(status=EpisodeStatus.NO_ANSWER), FailureMode.BAD_FORMAT),
        (play(HIT, status=EpisodeStatus.NO_ANSWER), FailureMode.BAD_FORMAT),
        (
            play(HIT, status=EpisodeStatus.NO_ANSWER, last=refused(ZoomErrorKind.LAST_ROUND)),
            FailureMode.RAN_OUT_OF_ROUNDS,
        ),
        (
            play(status=EpisodeStatus.NO_ANSWER, last=refused(ZoomErrorKind.INVALID_JSON)),
            FailureMode.RAN_OUT_OF_ROUNDS,
        ),
        (play(HIT, status=EpisodeStatus.TRUNCATED), FailureMode.TRUNCATED),
        (
            play(status=EpisodeStatus.TRUNCATED, last=refused(ZoomErrorKind.BUDGET_EXCEEDED)),
            FailureMode.TRUNCATED,
        ),
        (play(status=EpisodeStatus.FAILED), FailureMode.FAILED),
    ],
)
def test_every_class_where_the_event_is_known(played: Trajectory, failure: FailureMode) -> None:
    assert why(played, EVENT) is failure


@pytest.mark.parametrize(
    ("played", "failure"),
    [
        (play(), FailureMode.NEVER_ZOOMED),
        (play(AWAY), FailureMode.ZOOMED_LOCATION_UNKNOWN),
        (play(HIT), FailureMode.ZOOMED_LOCATION_UNKNOWN),
        (play(refused(ZoomErrorKind.REVERSED)), FailureMode.BAD_FORMAT),
        (play(status=EpisodeStatus.NO_ANSWER), FailureMode.BAD_FORMAT),
        (
            play(HIT, status=EpisodeStatus.NO_ANSWER, last=refused(ZoomErrorKind.LAST_ROUND)),
            FailureMode.RAN_OUT_OF_ROUNDS,
        ),
        (play(HIT, status=EpisodeStatus.TRUNCATED), FailureMode.TRUNCATED),
        (play(status=EpisodeStatus.FAILED), FailureMode.FAILED),
    ],
)
def test_without_the_truth_only_what_the_trace_decides(played: Trajectory, failure: FailureMode) -> None:
    assert why(played) is failure


MALFORMED = [
    fault
    for fault in ZoomErrorKind
    if fault not in (ZoomErrorKind.BUDGET_EXCEEDED, ZoomErrorKind.DECODE_ERROR, ZoomErrorKind.LAST_ROUND)
]


@pytest.mark.parametrize("fault", MALFORMED)
def test_who_only_wrote_malformed_calls_failed_by_format(fault: ZoomErrorKind) -> None:
    assert why(play(refused(fault), refused(fault)), EVENT) is FailureMode.BAD_FORMAT
    assert why(play(refused(fault), COARSE), EVENT) is FailureMode.TOO_COARSE, "it mended its call"


@pytest.mark.parametrize("fault", [ZoomErrorKind.BUDGET_EXCEEDED, ZoomErrorKind.DECODE_ERROR])
def test_who_was_refused_a_good_call_never_zoomed(fault: ZoomErrorKind) -> None:
    assert why(play(refused(fault)), EVENT) is FailureMode.NEVER_ZOOMED
    assert why(play(refused(ZoomErrorKind.REVERSED), refused(fault)), EVENT) is FailureMode.NEVER_ZOOMED


def test_an_answer_that_cannot_be_read_is_bad_format_wherever_it_looked() -> None:
    for played in (play(), play(AWAY), play(HIT), play(COARSE)):
        assert why(played, EVENT, unparsed=True) is FailureMode.BAD_FORMAT


@pytest.mark.parametrize(
    ("looks", "failure"),
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
def test_of_several_events_all_must_be_seen_and_outside_outweighs_too_coarse(
    looks: tuple[ShownClip, ...], failure: FailureMode
) -> None:
    assert why(play(*looks), EVENT, (40.0, 41.0)) is failure


@pytest.mark.parametrize(
    ("looked", "failure"),
    [
        (show_clip(10, 12.5, 10, 11), FailureMode.ZOOMED_ELSEWHERE),  # ends where the event begins
        (show_clip(10, 12.6, 10, 11), FailureMode.TOO_COARSE),
        (show_clip(14, 18, 14, 16), FailureMode.ZOOMED_ELSEWHERE),  # begins where the event ends
        (show_clip(13.9, 18, 14, 16), FailureMode.TOO_COARSE),
        (show_clip(12, 18, 12.5), FailureMode.WRONG_ANSWER),  # a frame at its very beginning
        (show_clip(12, 18, 14.0), FailureMode.TOO_COARSE),  # a frame at its very end no longer shows it
        (show_clip(12, 18, 13.99), FailureMode.WRONG_ANSWER),
    ],
)
def test_borders_of_an_event(looked: ShownClip, failure: FailureMode) -> None:
    assert why(play(looked), EVENT) is failure


@pytest.mark.parametrize(
    ("segment", "inside"), [((10, 12), True), ((12, 14), True), ((12.1, 14), False), ((10, 11.9), False)]
)
def test_an_event_of_no_length_is_an_instant(segment: tuple[float, float], inside: bool) -> None:
    assert overlaps(segment, (12.0, 12.0)) is inside


def test_a_right_episode_has_no_failure_however_it_went() -> None:
    task = Task("t", "v.mp4", "?", "A", evidence_spans=(EVENT,))
    for played in (play(), play(AWAY), play(refused(ZoomErrorKind.REVERSED))):
        assert classify_failure(task, played, correct=True) is None
    assert classify_failure(task, play(status=EpisodeStatus.FAILED), correct=True) is FailureMode.FAILED


@pytest.mark.parametrize("seed", range(20))
def test_in_the_needle_world_the_oracles_zooms_give_the_evidence_and_others_do_not(seed: int) -> None:
    """With the truth of the manifest: the right shot at 8 frames shows every flash, at 1 frame it may not."""
    for question in make_video(
        seed, 64.0, (QuestionKind.IDENTIFY, QuestionKind.COUNT, QuestionKind.DEEP)
    ).questions:
        task = Task("t", "v.mp4", question.text, question.answer, evidence_spans=question.events)
        start, end = question.zoom_path[-1]
        slot = (end - start) / 8
        sees = show_clip(start, end, *(start + (k + 0.5) * slot for k in range(8)))
        assert why(play(sees, overview=()), *task.evidence_spans) is FailureMode.WRONG_ANSWER
        blind = show_clip(
            start, end, *(t for t in sees.times if not any(a <= t < b for a, b in task.evidence_spans))
        )
        assert why(play(blind, overview=()), *task.evidence_spans) is FailureMode.TOO_COARSE
        away = show_clip(end % 60, end % 60 + 4, end % 60)
        if not any(overlaps((away.zoom.start_s, away.zoom.end_s), event) for event in task.evidence_spans):
            assert why(play(away, overview=()), *task.evidence_spans) is FailureMode.ZOOMED_ELSEWHERE


def test_results_are_counted_and_those_that_nobody_could_judge_are_no_failures(make: Make) -> None:
    results = [
        make("a"),
        make("b", right=False, zooms=()),
        make("c", right=False, zooms=((12.0,),)),
        make("d", right=False, note=f"{UNPARSED_NOTE}: 'x'"),
        make("e", valid=False, note="judge timeout: late"),
        make("f", valid=False, status=EpisodeStatus.FAILED),
        make("g", right=False, zooms=(), events=()),
    ]
    assert [classify_result(result) for result in results][4] is None
    counted = count_failures(results)
    assert list(counted) == [failure.value for failure in FailureMode]
    assert {name: count for name, count in counted.items() if count} == {
        "never_zoomed": 2, "right_place_too_coarse": 1, "bad_format": 1, "failed": 1,
    }  # fmt: skip


def test_an_answer_that_is_partly_right_is_not_right(make: Make) -> None:
    result = make("a")
    assert result.trajectory.reward is not None
    partly = replace(result.trajectory.reward, accuracy=0.7)
    half = replace(result, trajectory=replace(result.trajectory, reward=partly))
    assert classify_result(half) is FailureMode.WRONG_ANSWER
