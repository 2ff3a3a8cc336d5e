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
from vz_ray.episode.gate import ALWAYS, NEVER, Calibration, Point, save_gate
from vz_ray.episode.trajectory import Status
from vz_ray.evaluate.results import EvalResult, read_results
from vz_ray.observe.errors import UserError
from vz_ray.reward.accuracy import accuracy_of


@dataclass(frozen=True, slots=True)
class Measured:
    """One question, answered both ways.

    Attributes:
        uncertainty: Of the draft.
        draft: Accuracy of the draft; None if it did not end, and so is never the answer.
        whole: Accuracy of the episode.
        overview: Frames that the draft saw.
        frames: Frames that the episode saw.
    """

    uncertainty: float
    draft: float | None
    whole: float
    overview: int
    frames: int


def calibrate_file(log: Path, out: Path, *, price: float | None = None) -> dict[str, Calibration]:
    """Calibrates on the evaluation log `log`, and writes `out`.

    Args:
        log: Played with `episode.gate.mode: measure`.
        out: For `episode.gate.file`.
        price: Accuracy that a further frame per question must bring; None takes the threshold with the
            most accuracy per frame.

    Raises:
        UserError: The log is missing, or none of its episodes has a draft that can be scored.
    """
    try:
        results = read_results(log)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{log} is no log of an evaluation: {error!r}") from error
    measured, left_out = measure(results)
    if not measured:
        raise UserError(
            f"{log}: none of {len(results)} episodes has a draft that can be scored without a judge; "
            "play it with episode.gate.mode=measure"
        )
    found = {kind: calibrate(samples, price) for kind, samples in measured.items()}
    save_gate(out, found, {"log": log.name, "left_out": left_out, "price": price})
    return found


def measure(
    results: Sequence[EvalResult], reward: RewardConfig | None = None
) -> tuple[dict[str, list[Measured]], int]:
    """Episodes by kind of answer, and how many are left out: failed, not judged, or without a draft."""
    found: defaultdict[str, list[Measured]] = defaultdict(list)
    left_out = 0
    for result in results:
        played = result.trajectory
        gate = played.extra.get("gate")
        if not isinstance(gate, dict) or played.status is Status.FAILED or not gate["zoom"]:
            left_out += 1
            continue
        draft = accuracy_of(gate["draft"], [], result.task, reward or RewardConfig())
        if draft.invalid or played.reward is None or not played.reward.valid:
            left_out += 1
            continue
        found[str(gate["kind"])].append(
            Measured(
                uncertainty=float(gate["uncertainty"]),
                draft=None if gate["draft"] is None else draft.value,
                whole=played.reward.accuracy,
                overview=len(played.prompt.refs),
                frames=len(played.refs),
            )
        )
    return dict(found), left_out


def calibrate(samples: Sequence[Measured], price: float | None = None) -> Calibration:
    """The best threshold: that with the most accuracy per frame, or with the most accuracy after
    `price` times the frames. Of equals, the one with more accuracy, then the one that zooms less."""
    seen = sorted({sample.uncertainty for sample in samples})
    between = [(low + high) / 2 for low, high in pairwise(seen)]
    points = [point(samples, threshold) for threshold in (ALWAYS, *between, NEVER)]

    def worth(one: Point) -> tuple[float, float, float]:
        gain = one.accuracy / one.frames if price is None else one.accuracy - price * one.frames
        return (round(gain, 12), one.accuracy, -one.zooming)

    return Calibration(len(samples), max(points, key=worth), points[0], points[-1])


def point(samples: Sequence[Measured], threshold: float) -> Point:
    """What a threshold would have given."""
    accuracy = frames = zooming = 0.0
    for sample in samples:
        if sample.draft is None or sample.uncertainty > threshold:
            accuracy, frames, zooming = accuracy + sample.whole, frames + sample.frames, zooming + 1
        else:
            accuracy, frames = accuracy + sample.draft, frames + sample.overview
    count = len(samples)
    return Point(threshold, accuracy / count, frames / count, zooming / count)
