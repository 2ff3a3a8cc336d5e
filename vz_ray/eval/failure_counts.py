"""Why episodes went wrong, counted; the classes are those of `vz_ray/env/failure_modes.py`."""

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
    """Why the episode went wrong; None if it is right.

    Args:
        task: With the events that must be seen, where they are known.
        trajectory: As played.
        correct: Whether its answer was right.
        unparsed: Whether there is an answer that states nothing which can be compared.
    """
    turns = trajectory.turns
    trace = EpisodeTrace(
        status=trajectory.status,
        zooms=[(zoom.start_s, zoom.end_s) for zoom in trajectory.zooms],
        faults=[turn.zoom.kind for turn in turns if isinstance(turn.zoom, RejectedZoom)],
        ended_with_zoom_call=bool(turns) and turns[-1].zoom is not None,
        times=[ref.pts_s for ref in trajectory.frame_refs],
        events=task.evidence_spans,
    )
    return classify_trace(trace, correct=correct, unparsed=unparsed)


def classify_result(result: EvalResult) -> FailureMode | None:
    """As `failure_of`; None also for an episode that nobody could judge.

    Raises:
        ValueError: It was never scored.
    """
    parts = reward_parts_of(result)
    if not parts.valid and result.trajectory.status is not EpisodeStatus.FAILED:
        return None
    unparsed = parts.note.startswith(UNPARSED_NOTE)
    return classify_failure(result.task, result.trajectory, correct=parts.accuracy == 1, unparsed=unparsed)


def count_failures(results: Iterable[EvalResult]) -> dict[str, int]:
    """Episodes by what went wrong: every class, in the order of `FailureMode`."""
    found = Counter(classify_result(result) for result in results)
    return {failure.value: found[failure] for failure in FailureMode}
