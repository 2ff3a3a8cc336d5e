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

from vz_ray.env.trajectory import EpisodeStatus, ZoomErrorKind

Interval = tuple[float, float]
"""`[start, end)` in seconds; an instant where both are the same."""


class FailureMode(StrEnum):
    """What went wrong; in the order in which tables show them, and in words once `_` is a space."""

    NEVER_ZOOMED = "never_zoomed"
    ZOOMED_ELSEWHERE = "zoomed_elsewhere"
    TOO_COARSE = "right_place_too_coarse"
    WRONG_ANSWER = "right_evidence_wrong_answer"
    ZOOMED_LOCATION_UNKNOWN = "zoomed_place_unknown"
    BAD_FORMAT = "bad_format"
    RAN_OUT_OF_ROUNDS = "ran_out_of_rounds"
    TRUNCATED = "truncated"
    FAILED = "failed"


_WELL_FORMED_REFUSALS = (ZoomErrorKind.BUDGET_EXCEEDED, ZoomErrorKind.DECODE_ERROR, ZoomErrorKind.LAST_ROUND)
"""Refusals of calls that were well formed."""


@dataclass(frozen=True, slots=True)
class EpisodeTrace:
    """What of an episode says why it went wrong.

    Attributes:
        status: How it ended.
        zooms: Segments of the zooms that were carried out.
        faults: Why others were refused.
        ended_with_zoom_call: Whether the last turn asked for a zoom.
        times: Times of all frames shown, overview included, seconds.
        events: What had to be seen; empty where that is not known.
    """

    status: EpisodeStatus
    zooms: Sequence[Interval]
    faults: Sequence[ZoomErrorKind]
    ended_with_zoom_call: bool
    times: Sequence[float]
    events: Sequence[Interval]


def classify_failure(trace: EpisodeTrace, *, correct: bool, unparsed: bool = False) -> FailureMode | None:
    """Why the episode went wrong; None if it is right.

    Args:
        trace: As played.
        correct: Whether its answer was right.
        unparsed: Whether there is an answer that states nothing which can be compared.
    """
    if trace.status is EpisodeStatus.FAILED:
        return FailureMode.FAILED
    if correct:
        return None
    if trace.status is EpisodeStatus.TRUNCATED:
        return FailureMode.TRUNCATED
    if trace.status is EpisodeStatus.NO_ANSWER:
        return FailureMode.RAN_OUT_OF_ROUNDS if trace.ended_with_zoom_call else FailureMode.BAD_FORMAT
    if unparsed:
        return FailureMode.BAD_FORMAT
    if trace.events and all(is_visible(trace.times, event) for event in trace.events):
        return FailureMode.WRONG_ANSWER
    if not trace.zooms:
        malformed = trace.faults and all(fault not in _WELL_FORMED_REFUSALS for fault in trace.faults)
        return FailureMode.BAD_FORMAT if malformed else FailureMode.NEVER_ZOOMED
    return _classify_zoomed(trace)


def _classify_zoomed(trace: EpisodeTrace) -> FailureMode:
    """Of an episode that zoomed and did not see every event."""
    if not trace.events:
        return FailureMode.ZOOMED_LOCATION_UNKNOWN
    unseen = [event for event in trace.events if not is_visible(trace.times, event)]
    inside = all(any(overlaps(zoom, event) for zoom in trace.zooms) for event in unseen)
    return FailureMode.TOO_COARSE if inside else FailureMode.ZOOMED_ELSEWHERE


def is_visible(times: Iterable[float], event: Interval) -> bool:
    """Whether a frame lies in `[start, end)`; an event of no length is met at its instant."""
    start, end = event
    return any(start <= time < end or time == start for time in times)


def overlaps(segment: Interval, event: Interval) -> bool:
    """Whether some of `[start, end)`, or the instant that an event of no length is, lies in the segment."""
    start, end = event
    if start == end:
        return segment[0] <= start <= segment[1]
    return segment[0] < end and start < segment[1]
