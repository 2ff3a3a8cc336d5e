"""Zoom gate thresholds against hand-computed cases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vz_ray.data.episode_record import EpisodeRecord
from vz_ray.env.task import AnswerType, Task
from vz_ray.env.trajectory import (
    EpisodeId,
    EpisodeStatus,
    ExternalAction,
    RewardParts,
    TokenContext,
    Trajectory,
    Turn,
)
from vz_ray.env.zoom_gate import ALWAYS_ZOOM, NEVER_ZOOM, load_thresholds
from vz_ray.eval.eval_log import EvalLog
from vz_ray.eval.gate_calibration import (
    GateSample,
    apply_threshold,
    calibrate_from_log,
    choose_threshold,
    collect_gate_samples,
)
from vz_ray.utils.errors import UserError
from vz_ray.video.frame import FrameRef

# Draft and final answer agree at low uncertainty; zooming helps at high uncertainty.
SAMPLES = [
    GateSample(0.1, 1.0, 1.0, 16, 24),
    GateSample(0.2, 1.0, 1.0, 16, 24),
    GateSample(0.7, 0.0, 1.0, 16, 24),
    GateSample(0.9, 0.0, 0.0, 16, 24),
]


def test_threshold_zooms_only_above_it():
    assert apply_threshold(SAMPLES, ALWAYS_ZOOM) == replace(apply_threshold(SAMPLES, 0.0), threshold=ALWAYS_ZOOM)
    gated = apply_threshold(SAMPLES, 0.45)
    assert (gated.accuracy, gated.frames, gated.zoom_rate) == (0.75, 20.0, 0.5)
    never = apply_threshold(SAMPLES, NEVER_ZOOM)
    assert (never.accuracy, never.frames, never.zoom_rate) == (0.5, 16.0, 0.0)


def test_best_threshold_maximizes_accuracy_per_frame():
    calibration = choose_threshold(SAMPLES)
    assert calibration.best.threshold == pytest.approx(0.45)
    assert (calibration.always.accuracy, calibration.always.frames) == (0.75, 24.0)


def test_frame_cost_limits_zooming():
    assert choose_threshold(SAMPLES, frame_cost=0.5).best.zoom_rate == 0.0
    assert choose_threshold(SAMPLES, frame_cost=0.0).best.threshold == pytest.approx(0.45)


def test_cut_off_draft_forces_zooming():
    cut_off = [GateSample(0.0, None, 1.0, 16, 24)]
    assert apply_threshold(cut_off, NEVER_ZOOM).zoom_rate == 1.0


@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1))
def test_best_threshold_is_at_least_as_good_as_extremes(rows):
    samples = [GateSample(uncertainty, draft, final, 16, 20) for uncertainty, draft, final in rows]
    calibration = choose_threshold(samples)
    best = calibration.best
    for extreme in (calibration.always, calibration.never):
        assert best.accuracy / best.frames >= extreme.accuracy / extreme.frames - 1e-9


def ref(time_s: float) -> FrameRef:
    return FrameRef("v", "v.mp4", 0, time_s, 28, 28, "s", "d", "0")


def record(name: str, uncertainty: float, draft: str | None, *, accuracy: float, **changes: object) -> EpisodeRecord:
    task = Task(name, "v.mp4", "What? A. disc B. ring", "B")
    prompt = TokenContext((9, 9), ((1, 2, 2),) * 2, (ref(0), ref(1)), 9, merge_size=2)
    clip = TokenContext((9,), ((1, 2, 2),), (ref(2),), 9, merge_size=2)
    gate = {"zoom": True, "kind": "choice", "uncertainty": uncertainty, "draft": draft}
    trajectory = Trajectory(
        EpisodeId(0, name, 0),
        "w",
        prompt,
        (Turn(ExternalAction("", ()), "", None, clip), Turn(ExternalAction("", ()), "", None, None)),
        EpisodeStatus.ANSWERED,
        reward=RewardParts(accuracy, accuracy, 1.0, 0.0),
        extra={"gate": {**gate, "threshold": None, "seconds": 0.1}},
    )
    return EpisodeRecord(replace(task, **changes), trajectory, "agent")


def test_calibration_file_loads_as_thresholds(tmp_path: Path):
    log = EvalLog(tmp_path / "needle.jsonl", {"model": "m"})
    for i, (uncertainty, draft) in enumerate([(0.1, "B"), (0.2, "B"), (0.8, "A")]):
        log.append(record(f"t{i}", uncertainty, draft, accuracy=1.0))
    calibrations = calibrate_from_log(log.path, tmp_path / "gate.json")
    assert calibrations["choice"].num_questions == 3
    assert load_thresholds(str(tmp_path / "gate.json")) == {"choice": pytest.approx(0.5)}


def test_excluded_episodes_are_counted():
    plain = record("t0", 0.1, "B", accuracy=1.0)
    ungated = replace(plain, trajectory=replace(plain.trajectory, extra={}))
    judged = record("t1", 0.1, "B", accuracy=1.0, answer_type=AnswerType.OPEN_ENDED)
    failed = replace(plain, trajectory=replace(plain.trajectory, status=EpisodeStatus.FAILED))
    samples, excluded = collect_gate_samples([plain, ungated, judged, failed])
    assert (samples, excluded) == ({"choice": [GateSample(0.1, 1.0, 1.0, 2, 3)]}, 3)


def test_log_without_drafts_raises(tmp_path: Path):
    log = EvalLog(tmp_path / "plain.jsonl", {})
    plain = record("t0", 0.1, "B", accuracy=1.0)
    log.append(replace(plain, trajectory=replace(plain.trajectory, extra={})))
    with pytest.raises(UserError, match=r"0 of 1 episodes have a draft .*gate\.mode=measure"):
        calibrate_from_log(log.path, tmp_path / "gate.json")
    with pytest.raises(UserError, match=r"none\.jsonl is not an evaluation log"):
        calibrate_from_log(tmp_path / "none.jsonl", tmp_path / "gate.json")
