"""Each class of failure, and its borders, on episodes made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from tests.evaluate.conftest import Make, frames_at
from vz_ray.data.needle.world import Kind, make_video
from vz_ray.data.task import Task
from vz_ray.episode.failure import Failure, overlaps
from vz_ray.episode.trajectory import (
    Context,
    EpisodeId,
    Status,
    Trajectory,
    Turn,
    Written,
    ZoomFault,
    ZoomRefused,
)
from vz_ray.evaluate.failures import count_failures, failure_of, failure_of_result
from vz_ray.reward import UNPARSED
from vz_ray.video.frame import Zoom

EVENT = (12.5, 14.0)
OVERVIEW = (0.0, 10.0, 20.0, 30.0)


@dataclass(frozen=True)
class Look:
    """A zoom carried out, and the times of the frames that it showed."""

    zoom: Zoom
    times: Sequence[float]


def look(start: float, end: float, *times: float) -> Look:
    return Look(Zoom(start, end, max(1, len(times)) / (end - start)), times)


HIT = look(12, 16, 12, 13, 14, 15)
COARSE = look(12, 16, 12, 14)
AWAY = look(20, 24, 20, 22)


def refused(fault: ZoomFault) -> ZoomRefused:
    return ZoomRefused(fault, "no")


def play(
    *asked: Look | ZoomRefused,
    status: Status = Status.ANSWERED,
    last: Zoom | ZoomRefused | None = None,
    overview: Sequence[float] = OVERVIEW,
) -> Trajectory:
    turns = [
        Turn(Written("z", ()), "z", a.zoom, frames_at(a.times))
        if isinstance(a, Look)
        else Turn(Written("z", ()), "z", a, Context((3,)))
        for a in asked
    ]
    turns.append(Turn(Written("a", ()), "a", last, None))
    answer = "A" if status is Status.ANSWERED else None
    return Trajectory(EpisodeId(0, "t", 0), "clean", frames_at(overview), tuple(turns), status, answer)


def why(played: Trajectory, *events: tuple[float, float], unparsed: bool = False) -> Failure | None:
    return failure_of(Task("t", "v.mp4", "?", "A", events=events), played, right=False, unparsed=unparsed)


@pytest.mark.parametrize(
    ("played", "failure"),
    [
        (play(), Failure.NEVER_ZOOMED),
        (play(AWAY), Failure.ELSEWHERE),
        (play(COARSE), Failure.TOO_COARSE),
        (play(HIT), Failure.WRONG_ANSWER),
        (play(AWAY, COARSE), Failure.TOO_COARSE),
        (play(AWAY, COARSE, HIT), Failure.WRONG_ANSWER),
        (play(overview=(0, 13, 26)), Failure.WRONG_ANSWER),
        (play(AWAY, overview=(0, 13, 26)), Failure.WRONG_ANSWER),
        (play(status=Status.NO_ANSWER), Failure.BAD_FORMAT),
        (play(HIT, status=Status.NO_ANSWER), Failure.BAD_FORMAT),
        (play(HIT, status=Status.NO_ANSWER, last=refused(ZoomFault.LAST_ROUND)), Failure.OUT_OF_ROUNDS),
        (play(status=Status.NO_ANSWER, last=refused(ZoomFault.BROKEN_JSON)), Failure.OUT_OF_ROUNDS),
        (play(HIT, status=Status.TRUNCATED), Failure.TRUNCATED),
        (play(status=Status.TRUNCATED, last=refused(ZoomFault.NO_BUDGET)), Failure.TRUNCATED),
        (play(status=Status.FAILED), Failure.FAILED),
    ],
)
def test_every_class_where_the_event_is_known(played: Trajectory, failure: Failure) -> None:
    assert why(played, EVENT) is failure


@pytest.mark.parametrize(
    ("played", "failure"),
    [
        (play(), Failure.NEVER_ZOOMED),
        (play(AWAY), Failure.ZOOMED),
        (play(HIT), Failure.ZOOMED),
        (play(refused(ZoomFault.REVERSED)), Failure.BAD_FORMAT),
        (play(status=Status.NO_ANSWER), Failure.BAD_FORMAT),
        (play(HIT, status=Status.NO_ANSWER, last=refused(ZoomFault.LAST_ROUND)), Failure.OUT_OF_ROUNDS),
        (play(HIT, status=Status.TRUNCATED), Failure.TRUNCATED),
        (play(status=Status.FAILED), Failure.FAILED),
    ],
)
def test_without_the_truth_only_what_the_trace_decides(played: Trajectory, failure: Failure) -> None:
    assert why(played) is failure


MALFORMED = [
    fault for fault in ZoomFault if fault not in (ZoomFault.NO_BUDGET, ZoomFault.DECODE, ZoomFault.LAST_ROUND)
]


@pytest.mark.parametrize("fault", MALFORMED)
def test_who_only_wrote_malformed_calls_failed_by_format(fault: ZoomFault) -> None:
    assert why(play(refused(fault), refused(fault)), EVENT) is Failure.BAD_FORMAT
    assert why(play(refused(fault), COARSE), EVENT) is Failure.TOO_COARSE, "it mended its call"


@pytest.mark.parametrize("fault", [ZoomFault.NO_BUDGET, ZoomFault.DECODE])
def test_who_was_refused_a_good_call_never_zoomed(fault: ZoomFault) -> None:
    assert why(play(refused(fault)), EVENT) is Failure.NEVER_ZOOMED
    assert why(play(refused(ZoomFault.REVERSED), refused(fault)), EVENT) is Failure.NEVER_ZOOMED


def test_an_answer_that_cannot_be_read_is_bad_format_wherever_it_looked() -> None:
    for played in (play(), play(AWAY), play(HIT), play(COARSE)):
        assert why(played, EVENT, unparsed=True) is Failure.BAD_FORMAT


@pytest.mark.parametrize(
    ("looks", "failure"),
    [
        # The second event begins at 40 s.
        ((HIT,), Failure.ELSEWHERE),
        ((HIT, look(39, 43, 39, 41.5)), Failure.TOO_COARSE),
        ((HIT, look(39, 43, 39, 40.5)), Failure.WRONG_ANSWER),
        ((COARSE, look(39, 43, 39, 40.5)), Failure.TOO_COARSE),
        ((COARSE, AWAY), Failure.ELSEWHERE),
        ((look(0, 60, 0, 20, 50),), Failure.TOO_COARSE),
    ],
)
def test_of_several_events_all_must_be_seen_and_outside_outweighs_too_coarse(
    looks: tuple[Look, ...], failure: Failure
) -> None:
    assert why(play(*looks), EVENT, (40.0, 41.0)) is failure


@pytest.mark.parametrize(
    ("looked", "failure"),
    [
        (look(10, 12.5, 10, 11), Failure.ELSEWHERE),  # ends where the event begins
        (look(10, 12.6, 10, 11), Failure.TOO_COARSE),
        (look(14, 18, 14, 16), Failure.ELSEWHERE),  # begins where the event ends
        (look(13.9, 18, 14, 16), Failure.TOO_COARSE),
        (look(12, 18, 12.5), Failure.WRONG_ANSWER),  # a frame at its very beginning
        (look(12, 18, 14.0), Failure.TOO_COARSE),  # a frame at its very end no longer shows it
        (look(12, 18, 13.99), Failure.WRONG_ANSWER),
    ],
)
def test_borders_of_an_event(looked: Look, failure: Failure) -> None:
    assert why(play(looked), EVENT) is failure


@pytest.mark.parametrize(
    ("segment", "inside"), [((10, 12), True), ((12, 14), True), ((12.1, 14), False), ((10, 11.9), False)]
)
def test_an_event_of_no_length_is_an_instant(segment: tuple[float, float], inside: bool) -> None:
    assert overlaps(segment, (12.0, 12.0)) is inside


def test_a_right_episode_has_no_failure_however_it_went() -> None:
    task = Task("t", "v.mp4", "?", "A", events=(EVENT,))
    for played in (play(), play(AWAY), play(refused(ZoomFault.REVERSED))):
        assert failure_of(task, played, right=True) is None
    assert failure_of(task, play(status=Status.FAILED), right=True) is Failure.FAILED


@pytest.mark.parametrize("seed", range(20))
def test_in_the_needle_world_the_oracles_zooms_give_the_evidence_and_others_do_not(seed: int) -> None:
    """With the truth of the manifest: the right shot at 8 frames shows every flash, at 1 frame it may not."""
    for question in make_video(seed, 64.0, (Kind.IDENTIFY, Kind.COUNT, Kind.DEEP)).questions:
        task = Task("t", "v.mp4", question.text, question.answer, events=question.events)
        start, end = question.path[-1]
        slot = (end - start) / 8
        sees = look(start, end, *(start + (k + 0.5) * slot for k in range(8)))
        assert why(play(sees, overview=()), *task.events) is Failure.WRONG_ANSWER
        blind = look(start, end, *(t for t in sees.times if not any(a <= t < b for a, b in task.events)))
        assert why(play(blind, overview=()), *task.events) is Failure.TOO_COARSE
        away = look(end % 60, end % 60 + 4, end % 60)
        if not any(overlaps((away.zoom.start_s, away.zoom.end_s), event) for event in task.events):
            assert why(play(away, overview=()), *task.events) is Failure.ELSEWHERE


def test_results_are_counted_and_those_that_nobody_could_judge_are_no_failures(make: Make) -> None:
    results = [
        make("a"),
        make("b", right=False, zooms=()),
        make("c", right=False, zooms=((12.0,),)),
        make("d", right=False, note=f"{UNPARSED}: 'x'"),
        make("e", valid=False, note="judge timeout: late"),
        make("f", valid=False, status=Status.FAILED),
        make("g", right=False, zooms=(), events=()),
    ]
    assert [failure_of_result(result) for result in results][4] is None
    counted = count_failures(results)
    assert list(counted) == [failure.value for failure in Failure]
    assert {name: count for name, count in counted.items() if count} == {
        "never_zoomed": 2, "right_place_too_coarse": 1, "bad_format": 1, "failed": 1,
    }  # fmt: skip


def test_an_answer_that_is_partly_right_is_not_right(make: Make) -> None:
    result = make("a")
    assert result.trajectory.reward is not None
    partly = replace(result.trajectory.reward, accuracy=0.7)
    half = replace(result, trajectory=replace(result.trajectory, reward=partly))
    assert failure_of_result(half) is Failure.WRONG_ANSWER
