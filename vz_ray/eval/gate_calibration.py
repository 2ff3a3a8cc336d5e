"""Calibration of the zoom gate from an evaluation with `episode.gate.mode: measure`.

Each episode of such a log has two answers: the draft before zooming and the final
one. The accuracy of any threshold follows from them without new rollouts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from vz_ray.config.reward import RewardConfig
from vz_ray.env.trajectory import EpisodeStatus
from vz_ray.env.zoom_gate import ALWAYS_ZOOM, NEVER_ZOOM, CalibrationPoint, GateCalibration, save_calibration
from vz_ray.eval.eval_log import EvalResult, read_results
from vz_ray.rewards.accuracy import score_accuracy
from vz_ray.utils.errors import UserError


@dataclass(frozen=True, slots=True)
class GateSample:
    """Draft and final answer of one question.

    Attributes:
        uncertainty: Uncertainty of the draft, 0 to 1.
        draft_accuracy: Accuracy of the draft; None if the draft was cut off, so that zooming is forced.
        episode_accuracy: Accuracy of the final answer.
        draft_frames: Frames in the prompt of the draft.
        episode_frames: Frames of the whole episode.
    """

    uncertainty: float
    draft_accuracy: float | None
    episode_accuracy: float
    draft_frames: int
    episode_frames: int


def calibrate_from_log(log: Path, out: Path, *, frame_cost: float | None = None) -> dict[str, GateCalibration]:
    """Calibrate on an evaluation log and write the thresholds to `out`.

    Args:
        log: Log of an evaluation with `episode.gate.mode: measure`.
        out: Output file, for `episode.gate.thresholds_file`.
        frame_cost: Minimum accuracy gain per extra frame. None maximizes accuracy per frame.

    Raises:
        UserError: The log is missing or malformed, or has no draft that can be scored.
    """
    try:
        results = read_results(log)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{log} is not an evaluation log: {error!r}") from error
    samples_by_kind, excluded = collect_gate_samples(results)
    if not samples_by_kind:
        raise UserError(
            f"{log}: 0 of {len(results)} episodes have a draft that can be scored without a judge; "
            "run the evaluation with episode.gate.mode=measure"
        )
    calibrations = {kind: choose_threshold(samples, frame_cost) for kind, samples in samples_by_kind.items()}
    save_calibration(out, calibrations, {"log": log.name, "excluded": excluded, "frame_cost": frame_cost})
    return calibrations


def collect_gate_samples(
    results: Sequence[EvalResult], reward: RewardConfig | None = None
) -> tuple[dict[str, list[GateSample]], int]:
    """Return samples by kind of answer, and the number of excluded episodes.

    Failed episodes, episodes without a draft and answers that need a judge are excluded.
    """
    samples: defaultdict[str, list[GateSample]] = defaultdict(list)
    excluded = 0
    for result in results:
        trajectory = result.trajectory
        gate = trajectory.extra.get("gate")
        if not isinstance(gate, dict) or trajectory.status is EpisodeStatus.FAILED or not gate["zoom"]:
            excluded += 1
            continue
        draft = score_accuracy(gate["draft"], [], result.task, reward or RewardConfig())
        if draft.invalid_reason or trajectory.reward is None or not trajectory.reward.valid:
            excluded += 1
            continue
        samples[str(gate["kind"])].append(
            GateSample(
                uncertainty=float(gate["uncertainty"]),
                draft_accuracy=None if gate["draft"] is None else draft.value,
                episode_accuracy=trajectory.reward.accuracy,
                draft_frames=len(trajectory.prompt.frame_refs),
                episode_frames=len(trajectory.frame_refs),
            )
        )
    return dict(samples), excluded


def choose_threshold(samples: Sequence[GateSample], frame_cost: float | None = None) -> GateCalibration:
    """Return the best threshold and the two extremes, always and never zooming.

    The objective is accuracy per frame, or accuracy minus `frame_cost` times frames. Ties prefer higher
    accuracy, then fewer zooms.
    """
    uncertainties = sorted({sample.uncertainty for sample in samples})
    midpoints = [(low + high) / 2 for low, high in pairwise(uncertainties)]
    points = [apply_threshold(samples, threshold) for threshold in (ALWAYS_ZOOM, *midpoints, NEVER_ZOOM)]

    def objective(point: CalibrationPoint) -> tuple[float, float, float]:
        value = point.accuracy / point.frames if frame_cost is None else point.accuracy - frame_cost * point.frames
        return (round(value, 12), point.accuracy, -point.zoom_rate)

    return GateCalibration(len(samples), max(points, key=objective), points[0], points[-1])


def apply_threshold(samples: Sequence[GateSample], threshold: float) -> CalibrationPoint:
    """Return the accuracy, frames and zoom rate that `threshold` would give."""
    accuracy = frames = 0.0
    zooming = 0
    for sample in samples:
        if sample.draft_accuracy is None or sample.uncertainty > threshold:
            accuracy += sample.episode_accuracy
            frames += sample.episode_frames
            zooming += 1
        else:
            accuracy += sample.draft_accuracy
            frames += sample.draft_frames
    count = len(samples)
    return CalibrationPoint(threshold, accuracy / count, frames / count, zooming / count)
