"""Why an episode went wrong, from its trace and, where it is known, from what had to be seen.

Classes exclude one another; the first that fits is the one:

    failed             it could not be played: no fault of the policy
    truncated          a turn hit its limit, or the context was full
    ran out of rounds  the last round was spent on a zoom
    bad format         no answer, or one that cannot be read
    right evidence     every event was in some frame, overview included: it saw and misread
    bad format         it tried to zoom, and every call was malformed
    never zoomed       it did not try, or only where no zoom could be had
    zoomed elsewhere   some event that no frame shows lay outside all of its zooms
    too coarse         every such event lay in a zoom, between its frames
    place unknown      it zoomed, and the events are not known: the trace alone cannot tell more
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from enum import StrEnum

from vz_ray.data.task import Task
from vz_ray.episode.trajectory import Status, Trajectory, ZoomFault, ZoomRefused
from vz_ray.evaluate.metrics import in_frames, parts_of, saw_all_events
from vz_ray.evaluate.results import EvalResult
from vz_ray.reward import UNPARSED
from vz_ray.video.frame import Zoom


class Failure(StrEnum):
    """What went wrong; in the order in which tables show them, and in words once `_` is a space."""

    NEVER_ZOOMED = "never_zoomed"
    ELSEWHERE = "zoomed_elsewhere"
    TOO_COARSE = "right_place_too_coarse"
    WRONG_ANSWER = "right_evidence_wrong_answer"
    ZOOMED = "zoomed_place_unknown"
    BAD_FORMAT = "bad_format"
    OUT_OF_ROUNDS = "ran_out_of_rounds"
    TRUNCATED = "truncated"
    FAILED = "failed"


_NOT_ITS_FAULT = (ZoomFault.NO_BUDGET, ZoomFault.DECODE, ZoomFault.LAST_ROUND)
"""Refusals of calls that were well formed."""


def failure_of(task: Task, trajectory: Trajectory, *, right: bool, unparsed: bool = False) -> Failure | None:
    """Why the episode went wrong; None if it is right.

    Args:
        task: With the events that must be seen, where they are known.
        trajectory: As played.
        right: Whether its answer was right.
        unparsed: Whether there is an answer that states nothing which can be compared.
    """
    if trajectory.status is Status.FAILED:
        return Failure.FAILED
    if right:
        return None
    if trajectory.status is Status.TRUNCATED:
        return Failure.TRUNCATED
    if trajectory.status is Status.NO_ANSWER:
        asked = bool(trajectory.turns) and trajectory.turns[-1].zoom is not None
        return Failure.OUT_OF_ROUNDS if asked else Failure.BAD_FORMAT
    if unparsed:
        return Failure.BAD_FORMAT
    if task.events and saw_all_events(task, trajectory):
        return Failure.WRONG_ANSWER
    if not trajectory.zooms:
        return Failure.BAD_FORMAT if _only_malformed(trajectory) else Failure.NEVER_ZOOMED
    return _where(task, trajectory)


def _only_malformed(trajectory: Trajectory) -> bool:
    """Whether it tried to zoom and wrote no call that was well formed."""
    refused = [turn.zoom for turn in trajectory.turns if isinstance(turn.zoom, ZoomRefused)]
    return bool(refused) and all(zoom.fault not in _NOT_ITS_FAULT for zoom in refused)


def _where(task: Task, trajectory: Trajectory) -> Failure:
    """Of an episode that zoomed and did not see every event."""
    if not task.events:
        return Failure.ZOOMED
    times = [ref.pts_s for ref in trajectory.refs]
    unseen = [event for event in task.events if not in_frames(times, event)]
    inside = all(any(overlaps(zoom, event) for zoom in trajectory.zooms) for event in unseen)
    return Failure.TOO_COARSE if inside else Failure.ELSEWHERE


def overlaps(zoom: Zoom, event: tuple[float, float]) -> bool:
    """Whether some of `[start, end)`, or the instant that an event of no length is, lies in the segment."""
    start, end = event
    if start == end:
        return zoom.start_s <= start <= zoom.end_s
    return zoom.start_s < end and start < zoom.end_s


def failure_of_result(result: EvalResult) -> Failure | None:
    """As `failure_of`; None also for an episode that nobody could judge.

    Raises:
        ValueError: It was never scored.
    """
    parts = parts_of(result)
    if not parts.valid and result.trajectory.status is not Status.FAILED:
        return None
    unparsed = parts.note.startswith(UNPARSED)
    return failure_of(result.task, result.trajectory, right=parts.accuracy == 1, unparsed=unparsed)


def count_failures(results: Iterable[EvalResult]) -> dict[str, int]:
    """Episodes by what went wrong: every class, in the order of `Failure`."""
    found = Counter(failure_of_result(result) for result in results)
    return {failure.value: found[failure] for failure in Failure}
