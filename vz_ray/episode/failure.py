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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from vz_ray.episode.trajectory import Status, ZoomFault

Interval = tuple[float, float]
"""`[start, end)` in seconds; an instant where both are the same."""


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


@dataclass(frozen=True, slots=True)
class Trace:
    """What of an episode says why it went wrong.

    Attributes:
        status: How it ended.
        zooms: Segments of the zooms that were carried out.
        faults: Why others were refused.
        asked_last: Whether the last turn asked for a zoom.
        times: Times of all frames shown, overview included, seconds.
        events: What had to be seen; empty where that is not known.
    """

    status: Status
    zooms: Sequence[Interval]
    faults: Sequence[ZoomFault]
    asked_last: bool
    times: Sequence[float]
    events: Sequence[Interval]


def classify(trace: Trace, *, right: bool, unparsed: bool = False) -> Failure | None:
    """Why the episode went wrong; None if it is right.

    Args:
        trace: As played.
        right: Whether its answer was right.
        unparsed: Whether there is an answer that states nothing which can be compared.
    """
    if trace.status is Status.FAILED:
        return Failure.FAILED
    if right:
        return None
    if trace.status is Status.TRUNCATED:
        return Failure.TRUNCATED
    if trace.status is Status.NO_ANSWER:
        return Failure.OUT_OF_ROUNDS if trace.asked_last else Failure.BAD_FORMAT
    if unparsed:
        return Failure.BAD_FORMAT
    if trace.events and all(in_frames(trace.times, event) for event in trace.events):
        return Failure.WRONG_ANSWER
    if not trace.zooms:
        malformed = trace.faults and all(fault not in _NOT_ITS_FAULT for fault in trace.faults)
        return Failure.BAD_FORMAT if malformed else Failure.NEVER_ZOOMED
    return _where(trace)


def _where(trace: Trace) -> Failure:
    """Of an episode that zoomed and did not see every event."""
    if not trace.events:
        return Failure.ZOOMED
    unseen = [event for event in trace.events if not in_frames(trace.times, event)]
    inside = all(any(overlaps(zoom, event) for zoom in trace.zooms) for event in unseen)
    return Failure.TOO_COARSE if inside else Failure.ELSEWHERE


def in_frames(times: Iterable[float], event: Interval) -> bool:
    """Whether a frame lies in `[start, end)`; an event of no length is met at its instant."""
    start, end = event
    return any(start <= time < end or time == start for time in times)


def overlaps(segment: Interval, event: Interval) -> bool:
    """Whether some of `[start, end)`, or the instant that an event of no length is, lies in the segment."""
    start, end = event
    if start == end:
        return segment[0] <= start <= segment[1]
    return segment[0] < end and start < segment[1]
