"""The threshold that a validation log recommends, by hand."""

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

# Draft and episode agree where the draft is sure; zooming helps where it is not.
SAMPLES = [
    GateSample(0.1, 1.0, 1.0, 16, 24),
    GateSample(0.2, 1.0, 1.0, 16, 24),
    GateSample(0.7, 0.0, 1.0, 16, 24),
    GateSample(0.9, 0.0, 0.0, 16, 24),
]


def test_a_threshold_zooms_above_itself_alone():
    assert apply_threshold(SAMPLES, ALWAYS_ZOOM) == replace(
        apply_threshold(SAMPLES, 0.0), threshold=ALWAYS_ZOOM
    )
    gated = apply_threshold(SAMPLES, 0.45)
    assert (gated.accuracy, gated.frames, gated.zoom_rate) == (0.75, 20.0, 0.5)
    never = apply_threshold(SAMPLES, NEVER_ZOOM)
    assert (never.accuracy, never.frames, never.zoom_rate) == (0.5, 16.0, 0.0)


def test_the_best_threshold_has_the_most_accuracy_per_frame():
    found = choose_threshold(SAMPLES)
    assert found.best.threshold == pytest.approx(0.45)
    assert (found.always.accuracy, found.always.frames) == (0.75, 24.0)


def test_a_price_per_frame_decides_how_much_zooming_is_worth():
    assert choose_threshold(SAMPLES, frame_cost=0.5).best.zoom_rate == 0.0
    assert choose_threshold(SAMPLES, frame_cost=0.0).best.threshold == pytest.approx(0.45)


def test_a_draft_without_an_end_is_never_the_answer():
    one = [GateSample(0.0, None, 1.0, 16, 24)]
    assert apply_threshold(one, NEVER_ZOOM).zoom_rate == 1.0


@given(
    st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1)
)
def test_the_best_is_no_worse_than_always_or_never(rows):
    samples = [GateSample(u, draft, whole, 16, 20) for u, draft, whole in rows]
    found = choose_threshold(samples)
    for other in (found.always, found.never):
        assert found.best.accuracy / found.best.frames >= other.accuracy / other.frames - 1e-9


def ref(time_s: float) -> FrameRef:
    return FrameRef("v", "v.mp4", 0, time_s, 28, 28, "s", "d", "0")


def record(
    name: str, uncertainty: float, draft: str | None, *, right: float, **task: object
) -> EpisodeRecord:
    asked = Task(name, "v.mp4", "What? A. disc B. ring", "B")
    seen = TokenContext((9, 9), ((1, 2, 2),) * 2, (ref(0), ref(1)), 9)
    zoomed = TokenContext((9,), ((1, 2, 2),), (ref(2),), 9)
    gate = {"zoom": True, "kind": "choice", "uncertainty": uncertainty, "draft": draft}
    trajectory = Trajectory(
        EpisodeId(0, name, 0),
        "w",
        seen,
        (Turn(ExternalAction("", ()), "", None, zoomed), Turn(ExternalAction("", ()), "", None, None)),
        EpisodeStatus.ANSWERED,
        reward=RewardParts(right, right, 1.0, 0.0),
        extra={"gate": {**gate, "threshold": None, "seconds": 0.1}},
    )
    return EpisodeRecord(replace(asked, **task), trajectory, "agent")


def test_a_log_becomes_a_file_that_episodes_read(tmp_path: Path):
    log = EvalLog(tmp_path / "needle.jsonl", {"model": "m"})
    for i, (uncertainty, draft, right) in enumerate([(0.1, "B", 1.0), (0.2, "B", 1.0), (0.8, "A", 1.0)]):
        log.append(record(f"t{i}", uncertainty, draft, right=right))
    found = calibrate_from_log(log.path, tmp_path / "gate.json")
    assert found["choice"].num_questions == 3
    assert load_thresholds(str(tmp_path / "gate.json")) == {"choice": pytest.approx(0.5)}


def test_what_cannot_be_compared_is_counted():
    plain = record("t0", 0.1, "B", right=1.0)
    ungated = replace(plain, trajectory=replace(plain.trajectory, extra={}))
    judged = record("t1", 0.1, "B", right=1.0, answer_type=AnswerType.OPEN_ENDED)
    failed = replace(plain, trajectory=replace(plain.trajectory, status=EpisodeStatus.FAILED))
    measured, left_out = collect_gate_samples([plain, ungated, judged, failed])
    assert (measured, left_out) == ({"choice": [GateSample(0.1, 1.0, 1.0, 2, 3)]}, 3)


def test_a_log_without_drafts_is_refused(tmp_path: Path):
    log = EvalLog(tmp_path / "plain.jsonl", {})
    plain = record("t0", 0.1, "B", right=1.0)
    log.append(replace(plain, trajectory=replace(plain.trajectory, extra={})))
    with pytest.raises(UserError, match=r"none of 1 episodes has a draft .*gate\.mode=measure"):
        calibrate_from_log(log.path, tmp_path / "gate.json")
    with pytest.raises(UserError, match=r"none\.jsonl is no log"):
        calibrate_from_log(tmp_path / "none.jsonl", tmp_path / "gate.json")
