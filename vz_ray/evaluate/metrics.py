"""Figures of a set of played and scored episodes.

Invalid episodes (a dead worker, a question nobody can judge) are counted and
left out of every mean; an answer that cannot be read is wrong, and counted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vz_ray.config.evaluate import EvaluateConfig
from vz_ray.data.task import Task
from vz_ray.episode.failure import in_frames
from vz_ray.episode.trajectory import RewardParts, Status, Trajectory
from vz_ray.evaluate.interval import Interval, bootstrap
from vz_ray.evaluate.results import EvalResult
from vz_ray.observe import names
from vz_ray.reward import UNPARSED
from vz_ray.video.frame import Zoom


def zoomed_times(trajectory: Trajectory) -> list[float]:
    """Actual times of the frames that zooms showed, seconds."""
    return [
        ref.pts_s
        for turn in trajectory.turns
        if isinstance(turn.zoom, Zoom) and turn.reply is not None
        for ref in turn.reply.refs
    ]


def covers_event(task: Task, trajectory: Trajectory) -> bool:
    """Whether a zoom showed a frame of an event."""
    times = zoomed_times(trajectory)
    return any(in_frames(times, event) for event in task.events)


def saw_all_events(task: Task, trajectory: Trajectory) -> bool:
    """Whether any frame, overview included, showed each event: the question can be answered."""
    times = [ref.pts_s for ref in trajectory.refs]
    return all(in_frames(times, event) for event in task.events)


def parts_of(result: EvalResult) -> RewardParts:
    """The reward of a result.

    Raises:
        ValueError: It was never scored.
    """
    if result.trajectory.reward is None:
        raise ValueError(f"episode {result.trajectory.id} has no reward; score it first")
    return result.trajectory.reward


def accuracy_by_task(results: Iterable[EvalResult]) -> dict[str, float]:
    """Mean accuracy of each task's valid samples; what paired differences compare."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for result in results:
        if (parts := parts_of(result)).valid:
            found[result.task.task_id].append(parts.accuracy)
    return {task: sum(values) / len(values) for task, values in found.items()}


@dataclass(frozen=True, slots=True)
class EvalMetrics:
    """Figures of one evaluation. None where nothing was there to measure.

    Attributes:
        questions: Valid episodes; all means are over these.
        invalid: Episodes left out.
        invalid_reasons: How many of them for which reason.
        accuracy: Right answers, with an interval over videos.
        accuracy_by_kind: The same for each kind of question.
        reward: Mean of each reward part, unweighted, and of the total; a part that only some
            episodes have, such as a judge's score, over those.
        frames_mean: Frames shown, overview included.
        frames_p95: 95th percentile of the same.
        zooms_mean: Zooms carried out.
        zoom_call_rate: Episodes that tried a zoom.
        valid_zoom_rate: Zooms carried out, of zooms tried.
        event_coverage: Episodes in which a zoom showed a frame of an event.
        event_seen: Episodes in which every event was in some frame, overview included.
        reading_accuracy: Accuracy in those: can it read what it sees?
        unparsed: Answers that name no option or number.
        status: Fraction of episodes by how they ended.
        seconds_mean: Wall seconds per question.
        seconds_p95: 95th percentile of the same.
        fell_back: Overviews of uniform frames because the selector had nothing for the question.
        gate_rate: Episodes that the gate let zoom, of those that passed one.
    """

    questions: int
    invalid: int
    invalid_reasons: dict[str, int]
    accuracy: Interval | None
    accuracy_by_kind: dict[str, Interval]
    reward: dict[str, float]
    frames_mean: float | None
    frames_p95: float | None
    zooms_mean: float | None
    zoom_call_rate: float | None
    valid_zoom_rate: float | None
    event_coverage: float | None
    event_seen: float | None
    reading_accuracy: float | None
    unparsed: int
    status: dict[str, float]
    seconds_mean: float | None
    seconds_p95: float | None
    fell_back: int = 0
    gate_rate: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _p95(values: Sequence[float]) -> float | None:
    return float(np.percentile(values, 95)) if values else None


def _interval(results: Sequence[EvalResult], config: EvaluateConfig) -> Interval | None:
    if not results:
        return None
    return bootstrap(
        [parts_of(result).accuracy for result in results],
        [result.task.video for result in results],
        samples=config.bootstrap,
        level=config.level,
        seed=config.seed,
    )


def _by_kind(results: Sequence[EvalResult], config: EvaluateConfig) -> dict[str, Interval]:
    kinds: defaultdict[str, list[EvalResult]] = defaultdict(list)
    for result in results:
        if result.task.kind:
            kinds[result.task.kind].append(result)
    found = {kind: _interval(members, config) for kind, members in sorted(kinds.items())}
    return {kind: interval for kind, interval in found.items() if interval is not None}


def _reward_means(parts: Sequence[RewardParts]) -> dict[str, float]:
    found: defaultdict[str, list[float]] = defaultdict(list)
    for p in parts:
        own = {"total": p.total, "accuracy": p.accuracy, "format": p.format, "tool": p.tool}
        for name, value in {**p.more, **own}.items():
            found[name].append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def measure(results: Sequence[EvalResult], config: EvaluateConfig | None = None) -> EvalMetrics:
    """All figures of a set of scored results.

    Raises:
        ValueError: A result was never scored.
    """
    config = config or EvaluateConfig()
    valid = [result for result in results if parts_of(result).valid]
    plays = [result.trajectory for result in valid]
    known = [result for result in valid if result.task.events]
    seen = [result for result in known if saw_all_events(result.task, result.trajectory)]
    frames = [len(play.refs) for play in plays]
    tried = sum(play.zooms_tried for play in plays)
    return EvalMetrics(
        questions=len(valid),
        invalid=len(results) - len(valid),
        invalid_reasons=dict(Counter(p.reason for p in map(parts_of, results) if not p.valid)),
        accuracy=_interval(valid, config),
        accuracy_by_kind=_by_kind(valid, config),
        reward=_reward_means([parts_of(result) for result in valid]),
        frames_mean=_mean(frames),
        frames_p95=_p95(frames),
        zooms_mean=_mean([len(play.zooms) for play in plays]),
        zoom_call_rate=_mean([float(play.zooms_tried > 0) for play in plays]),
        valid_zoom_rate=sum(len(play.zooms) for play in plays) / tried if tried else None,
        event_coverage=_mean([float(covers_event(r.task, r.trajectory)) for r in known]),
        event_seen=_mean([float(saw_all_events(r.task, r.trajectory)) for r in known]),
        reading_accuracy=_mean([parts_of(result).accuracy for result in seen]),
        unparsed=sum(parts_of(result).note.startswith(UNPARSED) for result in valid),
        status={
            status.value: sum(r.trajectory.status is status for r in results) / len(results)
            for status in Status
            if results
        },
        seconds_mean=_mean([play.seconds for play in plays]),
        seconds_p95=_p95([play.seconds for play in plays]),
        fell_back=sum(bool(note["fell_back"]) for note in _noted(plays, "overview")),
        gate_rate=_mean([float(note["zoom"]) for note in _noted(plays, "gate")]),
    )


def _noted(plays: Sequence[Trajectory], name: str) -> list[dict[str, Any]]:
    """What the runner noted of each episode under this name, where it did."""
    notes = (play.extra.get(name) for play in plays)
    return [note for note in notes if isinstance(note, dict)]


def step_metrics(results: Sequence[EvalResult]) -> dict[str, float]:
    """What one training step's episodes looked like, under the names of `metrics.jsonl`.

    Of scored episodes; what could not be measured is left out.
    """
    figures = measure(results, EvaluateConfig(bootstrap=100))
    flat: dict[str, float | None] = {
        **{f"{names.REWARD_PREFIX}{name}": value for name, value in figures.reward.items()},
        names.ZOOM_CALL_RATE: figures.zoom_call_rate,
        names.ZOOM_VALID_RATE: figures.valid_zoom_rate,
        names.ZOOMS_MEAN: figures.zooms_mean,
        names.EVENT_COVERAGE: figures.event_coverage,
        names.FRAMES_MEAN: figures.frames_mean,
        names.ANSWERED: figures.status.get(Status.ANSWERED.value),
        names.UNPARSED: figures.unparsed / figures.questions if figures.questions else None,
        names.FELL_BACK: figures.fell_back / figures.questions if figures.fell_back else None,
        names.INVALID: figures.invalid / len(results) if results else None,
    }
    for reason, count in figures.invalid_reasons.items():
        flat[f"{names.INVALID_PREFIX}{reason.replace(' ', '_')}"] = count / len(results)
    return {name: value for name, value in flat.items() if value is not None}
