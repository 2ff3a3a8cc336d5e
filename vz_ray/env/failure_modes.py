"""Classify why an episode failed, from its trace and, if known, from the evidence it needed.

The classes are mutually exclusive and checked in this order:

    failed             the episode could not run; not the policy's fault
    truncated          a turn reached its token limit, or the context was full
    ran out of rounds  the last round was a zoom call
    bad format         no answer, or an unparsable one
    right evidence     every evidence span is covered by a frame; the answer is still wrong
    bad format         every zoom call was malformed
    never zoomed       no zoom call, or none that was allowed
    zoomed elsewhere   an uncovered evidence span is outside all zooms
    too coarse         every uncovered evidence span is inside a zoom, between its frames
    location unknown   the episode zoomed, but the evidence spans are unknown
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from vz_ray.env.trajectory import EpisodeStatus, ZoomErrorKind

Interval = tuple[float, float]
"""`[start, end)` in seconds; an instant if both are equal."""


class FailureMode(StrEnum):
    """Failure classes in table order. Replace `_` by spaces for display."""

    NEVER_ZOOMED = "never_zoomed"
    ZOOMED_ELSEWHERE = "zoomed_elsewhere"
    TOO_COARSE = "right_place_too_coarse"
    WRONG_ANSWER = "right_evidence_wrong_answer"
    ZOOMED_LOCATION_UNKNOWN = "zoomed_place_unknown"
    BAD_FORMAT = "bad_format"
    RAN_OUT_OF_ROUNDS = "ran_out_of_rounds"
    TRUNCATED = "truncated"
    FAILED = "failed"


_WELL_FORMED_REJECTIONS = (
    ZoomErrorKind.BUDGET_EXCEEDED,
    ZoomErrorKind.DECODE_ERROR,
    ZoomErrorKind.LAST_ROUND,
)
"""Rejection reasons of well-formed calls."""


@dataclass(frozen=True, slots=True)
class EpisodeTrace:
    """Summary of an episode for the classification.

    Attributes:
        zooms: Segments of the executed zooms.
        zoom_errors: Rejection reasons of the other zoom calls.
        ended_with_zoom_call: Whether the last turn contains a zoom call.
        times: Times of all frames including the overview, seconds.
        events: Evidence spans; empty if unknown.
    """

    status: EpisodeStatus
    zooms: Sequence[Interval]
    zoom_errors: Sequence[ZoomErrorKind]
    ended_with_zoom_call: bool
    times: Sequence[float]
    events: Sequence[Interval]


def classify_failure(trace: EpisodeTrace, *, correct: bool, unparsed: bool = False) -> FailureMode | None:
    """Return why the episode failed; None if it is correct. An `unparsed` answer has no comparable value."""
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
        malformed = trace.zoom_errors and all(error not in _WELL_FORMED_REJECTIONS for error in trace.zoom_errors)
        return FailureMode.BAD_FORMAT if malformed else FailureMode.NEVER_ZOOMED
    return _classify_zoomed(trace)


def _classify_zoomed(trace: EpisodeTrace) -> FailureMode:
    """Classify an episode that zoomed without covering every evidence span."""
    if not trace.events:
        return FailureMode.ZOOMED_LOCATION_UNKNOWN
    uncovered = [event for event in trace.events if not is_visible(trace.times, event)]
    inside = all(any(overlaps(zoom, event) for zoom in trace.zooms) for event in uncovered)
    return FailureMode.TOO_COARSE if inside else FailureMode.ZOOMED_ELSEWHERE


def is_visible(times: Iterable[float], event: Interval) -> bool:
    """Return whether a frame is in `[start, end)`, or at the instant of an empty span."""
    start, end = event
    return any(start <= time < end or time == start for time in times)


def overlaps(segment: Interval, event: Interval) -> bool:
    """Return whether the span, or the instant of an empty span, overlaps the segment."""
    start, end = event
    if start == end:
        return segment[0] <= start <= segment[1]
    return segment[0] < end and start < segment[1]
