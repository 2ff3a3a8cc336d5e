"""Counts of failure modes; `vz_ray.env.failure_modes` defines the classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from vz_ray.env.failure_modes import EpisodeTrace, FailureMode
from vz_ray.env.failure_modes import classify_failure as classify_trace
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeStatus, RejectedZoom, Trajectory
from vz_ray.eval.eval_log import EvalResult
from vz_ray.eval.eval_metrics import reward_parts_of
from vz_ray.rewards import UNPARSED_NOTE


def classify_failure(
    task: Task, trajectory: Trajectory, *, correct: bool, unparsed: bool = False
) -> FailureMode | None:
    """Return the failure mode of an episode, or None if its answer is correct.

    Args:
        task: Task of the episode; its evidence spans are optional.
        trajectory: The episode.
        correct: Whether the answer is correct.
        unparsed: Whether the answer could not be parsed.
    """
    turns = trajectory.turns
    trace = EpisodeTrace(
        status=trajectory.status,
        zooms=[(zoom.start_s, zoom.end_s) for zoom in trajectory.zooms],
        zoom_errors=[turn.zoom.kind for turn in turns if isinstance(turn.zoom, RejectedZoom)],
        ended_with_zoom_call=bool(turns) and turns[-1].zoom is not None,
        times=[ref.pts_s for ref in trajectory.frame_refs],
        events=task.evidence_spans,
    )
    return classify_trace(trace, correct=correct, unparsed=unparsed)


def classify_result(result: EvalResult) -> FailureMode | None:
    """Return the failure mode of a result, or None if it is correct or excluded as invalid.

    Raises:
        ValueError: The result has no reward.
    """
    parts = reward_parts_of(result)
    if not parts.valid and result.trajectory.status is not EpisodeStatus.FAILED:
        return None
    unparsed = parts.note.startswith(UNPARSED_NOTE)
    return classify_failure(result.task, result.trajectory, correct=parts.accuracy == 1, unparsed=unparsed)


def count_failures(results: Iterable[EvalResult]) -> dict[str, int]:
    """Count episodes by failure mode; every mode is a key, in the order of `FailureMode`."""
    counts = Counter(classify_result(result) for result in results)
    return {mode.value: counts[mode] for mode in FailureMode}
