"""Calibrates the zoom gate on an evaluation that was played with `episode.gate.mode: measure`.

Each of its episodes holds both answers: the draft's, and that of the whole
episode. So what any threshold would have given can be counted, question by
question, without playing again.
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
    """One question, answered both ways.

    Attributes:
        uncertainty: Of the draft.
        draft_accuracy: Accuracy of the draft; None if it did not end, and so is never the answer.
        episode_accuracy: Accuracy of the episode.
        draft_frames: Frames that the draft saw.
        episode_frames: Frames that the episode saw.
    """

    uncertainty: float
    draft_accuracy: float | None
    episode_accuracy: float
    draft_frames: int
    episode_frames: int


def calibrate_from_log(
    log: Path, out: Path, *, frame_cost: float | None = None
) -> dict[str, GateCalibration]:
    """Calibrates on the evaluation log `log`, and writes `out`.

    Args:
        log: Played with `episode.gate.mode: measure`.
        out: For `episode.gate.thresholds_file`.
        frame_cost: Accuracy that a further frame per question must bring; None takes the threshold with the
            most accuracy per frame.

    Raises:
        UserError: The log is missing, or none of its episodes has a draft that can be scored.
    """
    try:
        results = read_results(log)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{log} is no log of an evaluation: {error!r}") from error
    measured, left_out = collect_gate_samples(results)
    if not measured:
        raise UserError(
            f"{log}: none of {len(results)} episodes has a draft that can be scored without a judge; "
            "play it with episode.gate.mode=measure"
        )
    found = {kind: choose_threshold(samples, frame_cost) for kind, samples in measured.items()}
    save_calibration(out, found, {"log": log.name, "left_out": left_out, "price": frame_cost})
    return found


def collect_gate_samples(
    results: Sequence[EvalResult], reward: RewardConfig | None = None
) -> tuple[dict[str, list[GateSample]], int]:
    """Episodes by kind of answer, and how many are left out: failed, not judged, or without a draft."""
    found: defaultdict[str, list[GateSample]] = defaultdict(list)
    left_out = 0
    for result in results:
        played = result.trajectory
        gate = played.extra.get("gate")
        if not isinstance(gate, dict) or played.status is EpisodeStatus.FAILED or not gate["zoom"]:
            left_out += 1
            continue
        draft = score_accuracy(gate["draft"], [], result.task, reward or RewardConfig())
        if draft.invalid_reason or played.reward is None or not played.reward.valid:
            left_out += 1
            continue
        found[str(gate["kind"])].append(
            GateSample(
                uncertainty=float(gate["uncertainty"]),
                draft_accuracy=None if gate["draft"] is None else draft.value,
                episode_accuracy=played.reward.accuracy,
                draft_frames=len(played.prompt.frame_refs),
                episode_frames=len(played.frame_refs),
            )
        )
    return dict(found), left_out


def choose_threshold(samples: Sequence[GateSample], frame_cost: float | None = None) -> GateCalibration:
    """The best threshold: that with the most accuracy per frame, or with the most accuracy after
    `frame_cost` times the frames. Of equals, the one with more accuracy, then the one that zooms less."""
    seen = sorted({sample.uncertainty for sample in samples})
    between = [(low + high) / 2 for low, high in pairwise(seen)]
    points = [apply_threshold(samples, threshold) for threshold in (ALWAYS_ZOOM, *between, NEVER_ZOOM)]

    def worth(one: CalibrationPoint) -> tuple[float, float, float]:
        gain = one.accuracy / one.frames if frame_cost is None else one.accuracy - frame_cost * one.frames
        return (round(gain, 12), one.accuracy, -one.zoom_rate)

    return GateCalibration(len(samples), max(points, key=worth), points[0], points[-1])


def apply_threshold(samples: Sequence[GateSample], threshold: float) -> CalibrationPoint:
    """What a threshold would have given."""
    accuracy = frames = zooming = 0.0
    for sample in samples:
        if sample.draft_accuracy is None or sample.uncertainty > threshold:
            accuracy, frames, zooming = (
                accuracy + sample.episode_accuracy,
                frames + sample.episode_frames,
                zooming + 1,
            )
        else:
            accuracy, frames = accuracy + sample.draft_accuracy, frames + sample.draft_frames
    count = len(samples)
    return CalibrationPoint(threshold, accuracy / count, frames / count, zooming / count)
