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

from vz_ray.config.eval import EvalConfig
from vz_ray.env.failure_modes import is_visible
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeStatus, RewardParts, Trajectory
from vz_ray.eval.bootstrap import ConfidenceInterval, bootstrap_mean
from vz_ray.eval.eval_log import EvalResult
from vz_ray.monitoring import metric_names
from vz_ray.rewards import UNPARSED_NOTE
from vz_ray.video.frame import ZoomRequest


def zoom_frame_times(trajectory: Trajectory) -> list[float]:
    """Actual times of the frames that zooms showed, seconds."""
    return [
        ref.pts_s
        for turn in trajectory.turns
        if isinstance(turn.zoom, ZoomRequest) and turn.observation is not None
        for ref in turn.observation.frame_refs
    ]


def zoom_shows_event(task: Task, trajectory: Trajectory) -> bool:
    """Whether a zoom showed a frame of an event."""
    times = zoom_frame_times(trajectory)
    return any(is_visible(times, event) for event in task.evidence_spans)


def all_events_visible(task: Task, trajectory: Trajectory) -> bool:
    """Whether any frame, overview included, showed each event: the question can be answered."""
    times = [ref.pts_s for ref in trajectory.frame_refs]
    return all(is_visible(times, event) for event in task.evidence_spans)


def reward_parts_of(result: EvalResult) -> RewardParts:
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
        if (parts := reward_parts_of(result)).valid:
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
        event_visible_rate: Episodes in which every event was in some frame, overview included.
        reading_accuracy: Accuracy in those: can it read what it sees?
        unparsed: Answers that name no option or number.
        status: Fraction of episodes by how they ended.
        seconds_mean: Wall seconds per question.
        seconds_p95: 95th percentile of the same.
        selector_fallbacks: Overviews of uniform frames because the selector had nothing for the question.
        gate_rate: Episodes that the gate let zoom, of those that passed one.
    """

    questions: int
    invalid: int
    invalid_reasons: dict[str, int]
    accuracy: ConfidenceInterval | None
    accuracy_by_kind: dict[str, ConfidenceInterval]
    reward: dict[str, float]
    frames_mean: float | None
    frames_p95: float | None
    zooms_mean: float | None
    zoom_call_rate: float | None
    valid_zoom_rate: float | None
    event_coverage: float | None
    event_visible_rate: float | None
    reading_accuracy: float | None
    unparsed: int
    status: dict[str, float]
    seconds_mean: float | None
    seconds_p95: float | None
    selector_fallbacks: int = 0
    gate_rate: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _p95(values: Sequence[float]) -> float | None:
    return float(np.percentile(values, 95)) if values else None


def _interval(results: Sequence[EvalResult], config: EvalConfig) -> ConfidenceInterval | None:
    if not results:
        return None
    return bootstrap_mean(
        [reward_parts_of(result).accuracy for result in results],
        [result.task.video for result in results],
        num_resamples=config.bootstrap_resamples,
        confidence_level=config.confidence_level,
        seed=config.seed,
    )


def _by_kind(results: Sequence[EvalResult], config: EvalConfig) -> dict[str, ConfidenceInterval]:
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
        for name, value in {**p.extra, **own}.items():
            found[name].append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def compute_eval_metrics(results: Sequence[EvalResult], config: EvalConfig | None = None) -> EvalMetrics:
    """All figures of a set of scored results.

    Raises:
        ValueError: A result was never scored.
    """
    config = config or EvalConfig()
    valid = [result for result in results if reward_parts_of(result).valid]
    plays = [result.trajectory for result in valid]
    known = [result for result in valid if result.task.evidence_spans]
    seen = [result for result in known if all_events_visible(result.task, result.trajectory)]
    frames = [len(play.frame_refs) for play in plays]
    tried = sum(play.num_zoom_calls for play in plays)
    return EvalMetrics(
        questions=len(valid),
        invalid=len(results) - len(valid),
        invalid_reasons=dict(Counter(p.reason for p in map(reward_parts_of, results) if not p.valid)),
        accuracy=_interval(valid, config),
        accuracy_by_kind=_by_kind(valid, config),
        reward=_reward_means([reward_parts_of(result) for result in valid]),
        frames_mean=_mean(frames),
        frames_p95=_p95(frames),
        zooms_mean=_mean([len(play.zooms) for play in plays]),
        zoom_call_rate=_mean([float(play.num_zoom_calls > 0) for play in plays]),
        valid_zoom_rate=sum(len(play.zooms) for play in plays) / tried if tried else None,
        event_coverage=_mean([float(zoom_shows_event(r.task, r.trajectory)) for r in known]),
        event_visible_rate=_mean([float(all_events_visible(r.task, r.trajectory)) for r in known]),
        reading_accuracy=_mean([reward_parts_of(result).accuracy for result in seen]),
        unparsed=sum(reward_parts_of(result).note.startswith(UNPARSED_NOTE) for result in valid),
        status={
            status.value: sum(r.trajectory.status is status for r in results) / len(results)
            for status in EpisodeStatus
            if results
        },
        seconds_mean=_mean([play.seconds for play in plays]),
        seconds_p95=_p95([play.seconds for play in plays]),
        selector_fallbacks=sum(bool(note["used_fallback"]) for note in _noted(plays, "overview")),
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
    figures = compute_eval_metrics(results, EvalConfig(bootstrap_resamples=100))
    flat: dict[str, float | None] = {
        **{f"{metric_names.REWARD_PREFIX}{name}": value for name, value in figures.reward.items()},
        metric_names.ZOOM_CALL_RATE: figures.zoom_call_rate,
        metric_names.ZOOM_VALID_RATE: figures.valid_zoom_rate,
        metric_names.ZOOMS_PER_EPISODE: figures.zooms_mean,
        metric_names.EVENT_COVERAGE: figures.event_coverage,
        metric_names.FRAMES_PER_EPISODE: figures.frames_mean,
        metric_names.ANSWERED_RATE: figures.status.get(EpisodeStatus.ANSWERED.value),
        metric_names.UNPARSED_RATE: figures.unparsed / figures.questions if figures.questions else None,
        metric_names.OVERVIEW_FALLBACK_RATE: figures.selector_fallbacks / figures.questions
        if figures.selector_fallbacks
        else None,
        metric_names.INVALID_RATE: figures.invalid / len(results) if results else None,
    }
    for reason, count in figures.invalid_reasons.items():
        flat[f"{metric_names.INVALID_REASON_PREFIX}{reason.replace(' ', '_')}"] = count / len(results)
    return {name: value for name, value in flat.items() if value is not None}
