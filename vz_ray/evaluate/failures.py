"""Why episodes went wrong, counted; the classes are those of `vz_ray/episode/failure.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from vz_ray.data.task import Task
from vz_ray.episode.failure import Failure, Trace, classify
from vz_ray.episode.trajectory import Status, Trajectory, ZoomRefused
from vz_ray.evaluate.metrics import parts_of
from vz_ray.evaluate.results import EvalResult
from vz_ray.reward import UNPARSED


def failure_of(task: Task, trajectory: Trajectory, *, right: bool, unparsed: bool = False) -> Failure | None:
    """Why the episode went wrong; None if it is right.

    Args:
        task: With the events that must be seen, where they are known.
        trajectory: As played.
        right: Whether its answer was right.
        unparsed: Whether there is an answer that states nothing which can be compared.
    """
    turns = trajectory.turns
    trace = Trace(
        status=trajectory.status,
        zooms=[(zoom.start_s, zoom.end_s) for zoom in trajectory.zooms],
        faults=[turn.zoom.fault for turn in turns if isinstance(turn.zoom, ZoomRefused)],
        asked_last=bool(turns) and turns[-1].zoom is not None,
        times=[ref.pts_s for ref in trajectory.refs],
        events=task.events,
    )
    return classify(trace, right=right, unparsed=unparsed)


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
