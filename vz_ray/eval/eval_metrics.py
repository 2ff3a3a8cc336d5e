"""Metrics over scored episodes.

Invalid episodes (a dead worker, a failed judge) are counted and excluded from
every mean. An answer that cannot be parsed counts as wrong.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vz_ray.config.run import EvalConfig
from vz_ray.env.episode_runner import RESUMED_TURNS_KEY
from vz_ray.env.failure_modes import is_visible
from vz_ray.env.task import Task
from vz_ray.env.trajectory import EpisodeStatus, RewardParts, Trajectory
from vz_ray.eval.bootstrap import ConfidenceInterval, bootstrap_mean
from vz_ray.eval.eval_log import EvalResult
from vz_ray.monitoring import metric_names
from vz_ray.rewards import UNPARSED_NOTE
from vz_ray.video.frame import ZoomRequest


def zoom_frame_times(trajectory: Trajectory) -> list[float]:
    """Return the timestamps of all frames from zooms, in seconds."""
    return [
        ref.pts_s
        for turn in trajectory.turns
        if isinstance(turn.zoom, ZoomRequest) and turn.observation is not None
        for ref in turn.observation.frame_refs
    ]


def zoom_shows_event(task: Task, trajectory: Trajectory) -> bool:
    """Return whether a zoom returned a frame of any evidence span."""
    times = zoom_frame_times(trajectory)
    return any(is_visible(times, event) for event in task.evidence_spans)


def all_events_visible(task: Task, trajectory: Trajectory) -> bool:
    """Return whether every evidence span has a frame in the overview or a zoom."""
    times = [ref.pts_s for ref in trajectory.frame_refs]
    return all(is_visible(times, event) for event in task.evidence_spans)


def reward_parts_of(result: EvalResult) -> RewardParts:
    """Return the reward of a result.

    Raises:
        ValueError: The episode has no reward.
    """
    if result.trajectory.reward is None:
        raise ValueError(f"episode {result.trajectory.id} has no reward; score it first")
    return result.trajectory.reward


def accuracy_by_task(results: Iterable[EvalResult]) -> dict[str, float]:
    """Return the mean accuracy of each task over its valid samples, by task id."""
    accuracies: defaultdict[str, list[float]] = defaultdict(list)
    for result in results:
        if (parts := reward_parts_of(result)).valid:
            accuracies[result.task.task_id].append(parts.accuracy)
    return {task: sum(values) / len(values) for task, values in accuracies.items()}


@dataclass(frozen=True, slots=True)
class EvalMetrics:
    """Metrics of one evaluation. A metric without samples is None.

    Attributes:
        questions: Number of valid episodes; all means are over these.
        invalid: Number of excluded episodes.
        invalid_reasons: Number of excluded episodes by reason.
        accuracy: Mean accuracy with a confidence interval over videos.
        accuracy_by_kind: Accuracy by kind of question.
        reward: Unweighted mean of each reward part, and of the total. An optional part, such as a
            judge score, is averaged over the episodes that have it.
        frames_mean: Mean frames per episode, overview included.
        frames_p95: 95th percentile of the frames per episode.
        zooms_mean: Mean successful zooms per episode.
        zoom_call_rate: Fraction of episodes with a zoom call.
        valid_zoom_rate: Fraction of zoom calls that returned a clip.
        event_coverage: Fraction of episodes in which a zoom returned a frame of an evidence span.
        event_visible_rate: Fraction of episodes in which every evidence span has a frame.
        reading_accuracy: Accuracy over the episodes in which every evidence span has a frame.
        unparsed: Number of answers that could not be parsed.
        status: Fraction of episodes by final status.
        seconds_mean: Mean wall seconds per question.
        seconds_p95: 95th percentile of the wall seconds per question.
        selector_fallbacks: Number of overviews in which the frame selector fell back to uniform frames.
        gate_rate: Fraction of gated episodes that the zoom gate let zoom.
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


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _p95(values: Sequence[float]) -> float | None:
    return float(np.percentile(values, 95)) if values else None


def zoom_accuracy_gain(results: Iterable[EvalResult]) -> float | None:
    """Return the accuracy of samples with a valid zoom minus that of the others.

    The mean over the groups (tasks) that have both kinds of valid samples; None if there is no such group.
    """
    groups: defaultdict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for result in results:
        if (parts := reward_parts_of(result)).valid:
            groups[result.task.task_id][bool(result.trajectory.zooms)].append(parts.accuracy)
    gains = [np.mean(zoomed) - np.mean(others) for others, zoomed in groups.values() if others and zoomed]
    return float(np.mean(gains)) if gains else None


def _interval(results: Sequence[EvalResult], config: EvalConfig) -> ConfidenceInterval | None:
    if not results:
        return None
    return bootstrap_mean(
        [reward_parts_of(result).accuracy for result in results],
        [result.task.video for result in results],
        config,
    )


def _by_kind(results: Sequence[EvalResult], config: EvalConfig) -> dict[str, ConfidenceInterval]:
    kinds: defaultdict[str, list[EvalResult]] = defaultdict(list)
    for result in results:
        if result.task.kind:
            kinds[result.task.kind].append(result)
    intervals = {kind: _interval(members, config) for kind, members in sorted(kinds.items())}
    return {kind: interval for kind, interval in intervals.items() if interval is not None}


def _reward_means(rewards: Sequence[RewardParts]) -> dict[str, float]:
    values_by_part: defaultdict[str, list[float]] = defaultdict(list)
    for reward in rewards:
        standard_parts = {
            "total": reward.total,
            "accuracy": reward.accuracy,
            "format": reward.format,
            "tool": reward.tool,
        }
        for name, value in {**reward.extra, **standard_parts}.items():
            values_by_part[name].append(value)
        if reward.turns:
            values_by_part["turn_rewards"].append(sum(reward.turns))
    return {name: sum(values) / len(values) for name, values in values_by_part.items()}


def compute_eval_metrics(results: Sequence[EvalResult], config: EvalConfig | None = None) -> EvalMetrics:
    """Compute all metrics of a set of scored results.

    Raises:
        ValueError: A result has no reward.
    """
    config = config or EvalConfig()
    valid = [result for result in results if reward_parts_of(result).valid]
    trajectories = [result.trajectory for result in valid]
    with_evidence = [result for result in valid if result.task.evidence_spans]
    visible = [result for result in with_evidence if all_events_visible(result.task, result.trajectory)]
    frames = [len(trajectory.frame_refs) for trajectory in trajectories]
    zoom_calls = sum(trajectory.num_zoom_calls for trajectory in trajectories)
    return EvalMetrics(
        questions=len(valid),
        invalid=len(results) - len(valid),
        invalid_reasons=dict(Counter(p.reason for p in map(reward_parts_of, results) if not p.valid)),
        accuracy=_interval(valid, config),
        accuracy_by_kind=_by_kind(valid, config),
        reward=_reward_means([reward_parts_of(result) for result in valid]),
        frames_mean=_mean(frames),
        frames_p95=_p95(frames),
        zooms_mean=_mean([len(trajectory.zooms) for trajectory in trajectories]),
        zoom_call_rate=_mean([float(trajectory.num_zoom_calls > 0) for trajectory in trajectories]),
        valid_zoom_rate=(
            sum(len(trajectory.zooms) for trajectory in trajectories) / zoom_calls if zoom_calls else None
        ),
        event_coverage=_mean([float(zoom_shows_event(r.task, r.trajectory)) for r in with_evidence]),
        event_visible_rate=_mean([float(all_events_visible(r.task, r.trajectory)) for r in with_evidence]),
        reading_accuracy=_mean([reward_parts_of(result).accuracy for result in visible]),
        unparsed=sum(reward_parts_of(result).note.startswith(UNPARSED_NOTE) for result in valid),
        status={
            status.value: sum(r.trajectory.status is status for r in results) / len(results)
            for status in EpisodeStatus
            if results
        },
        seconds_mean=_mean([trajectory.seconds for trajectory in trajectories]),
        seconds_p95=_p95([trajectory.seconds for trajectory in trajectories]),
        selector_fallbacks=sum(bool(extra["used_fallback"]) for extra in _extras(trajectories, "overview")),
        gate_rate=_mean([float(extra["zoom"]) for extra in _extras(trajectories, "gate")]),
    )


def _extras(trajectories: Sequence[Trajectory], key: str) -> list[dict[str, Any]]:
    """Return the entries `extra[key]` of the trajectories that have one."""
    entries = (trajectory.extra.get(key) for trajectory in trajectories)
    return [entry for entry in entries if isinstance(entry, dict)]


def step_metrics(results: Sequence[EvalResult]) -> dict[str, float]:
    """Return the metrics of one training step's scored episodes, under the names of `metrics.jsonl`.

    Metrics without samples are omitted.
    """
    metrics = compute_eval_metrics(results, EvalConfig(bootstrap_resamples=100))
    flat: dict[str, float | None] = {
        **{f"{metric_names.REWARD_PREFIX}{name}": value for name, value in metrics.reward.items()},
        metric_names.ZOOM_CALL_RATE: metrics.zoom_call_rate,
        metric_names.ZOOM_VALID_RATE: metrics.valid_zoom_rate,
        metric_names.ZOOMS_PER_EPISODE: metrics.zooms_mean,
        metric_names.EVENT_COVERAGE: metrics.event_coverage,
        metric_names.ZOOM_ACCURACY_GAIN: zoom_accuracy_gain(results),
        metric_names.FRAMES_PER_EPISODE: metrics.frames_mean,
        metric_names.OVERVIEW_FRAMES: _mean([len(result.trajectory.prompt.frame_refs) for result in results]),
        metric_names.ANSWERED_RATE: metrics.status.get(EpisodeStatus.ANSWERED.value),
        metric_names.UNPARSED_RATE: metrics.unparsed / metrics.questions if metrics.questions else None,
        metric_names.OVERVIEW_FALLBACK_RATE: (
            metrics.selector_fallbacks / metrics.questions if metrics.selector_fallbacks else None
        ),
        metric_names.RESUMED_TURNS: sum(
            float(str(result.trajectory.extra.get(RESUMED_TURNS_KEY, 0))) for result in results
        )
        or None,
        metric_names.INVALID_RATE: metrics.invalid / len(results) if results else None,
    }
    for reason, count in metrics.invalid_reasons.items():
        flat[f"{metric_names.INVALID_REASON_PREFIX}{reason.replace(' ', '_')}"] = count / len(results)
    return {name: value for name, value in flat.items() if value is not None}
