"""The threshold that a validation log recommends, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vz_ray.data.record import EpisodeRecord
from vz_ray.data.task import AnswerType, Task
from vz_ray.episode.gate import ALWAYS, NEVER, read_thresholds
from vz_ray.episode.trajectory import Context, EpisodeId, RewardParts, Status, Trajectory, Turn, Written
from vz_ray.evaluate.gate import Measured, calibrate, calibrate_file, measure, point
from vz_ray.evaluate.results import EvalLog
from vz_ray.observe.errors import UserError
from vz_ray.video.frame import FrameRef

# Draft and episode agree where the draft is sure; zooming helps where it is not.
SAMPLES = [
    Measured(0.1, 1.0, 1.0, 16, 24),
    Measured(0.2, 1.0, 1.0, 16, 24),
    Measured(0.7, 0.0, 1.0, 16, 24),
    Measured(0.9, 0.0, 0.0, 16, 24),
]


def test_a_threshold_zooms_above_itself_alone():
    assert point(SAMPLES, ALWAYS) == replace(point(SAMPLES, 0.0), threshold=ALWAYS)
    gated = point(SAMPLES, 0.45)
    assert (gated.accuracy, gated.frames, gated.zooming) == (0.75, 20.0, 0.5)
    never = point(SAMPLES, NEVER)
    assert (never.accuracy, never.frames, never.zooming) == (0.5, 16.0, 0.0)


def test_the_best_threshold_has_the_most_accuracy_per_frame():
    found = calibrate(SAMPLES)
    assert found.best.threshold == pytest.approx(0.45)
    assert (found.always.accuracy, found.always.frames) == (0.75, 24.0)


def test_a_price_per_frame_decides_how_much_zooming_is_worth():
    assert calibrate(SAMPLES, price=0.5).best.zooming == 0.0
    assert calibrate(SAMPLES, price=0.0).best.threshold == pytest.approx(0.45)


def test_a_draft_without_an_end_is_never_the_answer():
    one = [Measured(0.0, None, 1.0, 16, 24)]
    assert point(one, NEVER).zooming == 1.0


@given(
    st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1)
)
def test_the_best_is_no_worse_than_always_or_never(rows):
    samples = [Measured(u, draft, whole, 16, 20) for u, draft, whole in rows]
    found = calibrate(samples)
    for other in (found.always, found.never):
        assert found.best.accuracy / found.best.frames >= other.accuracy / other.frames - 1e-9


def ref(time_s: float) -> FrameRef:
    return FrameRef("v", "v.mp4", 0, time_s, 28, 28, "s", "d", "0")


def record(
    name: str, uncertainty: float, draft: str | None, *, right: float, **task: object
) -> EpisodeRecord:
    asked = Task(name, "v.mp4", "What? A. disc B. ring", "B")
    seen = Context((9, 9), ((1, 2, 2),) * 2, (ref(0), ref(1)), 9)
    zoomed = Context((9,), ((1, 2, 2),), (ref(2),), 9)
    gate = {"zoom": True, "kind": "choice", "uncertainty": uncertainty, "draft": draft}
    trajectory = Trajectory(
        EpisodeId(0, name, 0),
        "w",
        seen,
        (Turn(Written("", ()), "", None, zoomed), Turn(Written("", ()), "", None, None)),
        Status.ANSWERED,
        reward=RewardParts(right, right, 1.0, 0.0),
        extra={"gate": {**gate, "threshold": None, "seconds": 0.1}},
    )
    return EpisodeRecord(replace(asked, **task), trajectory, "agent")


def test_a_log_becomes_a_file_that_episodes_read(tmp_path: Path):
    log = EvalLog(tmp_path / "needle.jsonl", {"model": "m"})
    for i, (uncertainty, draft, right) in enumerate([(0.1, "B", 1.0), (0.2, "B", 1.0), (0.8, "A", 1.0)]):
        log.append(record(f"t{i}", uncertainty, draft, right=right))
    found = calibrate_file(log.path, tmp_path / "gate.json")
    assert found["choice"].questions == 3
    assert read_thresholds(str(tmp_path / "gate.json")) == {"choice": pytest.approx(0.5)}


def test_what_cannot_be_compared_is_counted():
    plain = record("t0", 0.1, "B", right=1.0)
    ungated = replace(plain, trajectory=replace(plain.trajectory, extra={}))
    judged = record("t1", 0.1, "B", right=1.0, answer_type=AnswerType.OPEN_ENDED)
    failed = replace(plain, trajectory=replace(plain.trajectory, status=Status.FAILED))
    measured, left_out = measure([plain, ungated, judged, failed])
    assert (measured, left_out) == ({"choice": [Measured(0.1, 1.0, 1.0, 2, 3)]}, 3)


def test_a_log_without_drafts_is_refused(tmp_path: Path):
    log = EvalLog(tmp_path / "plain.jsonl", {})
    plain = record("t0", 0.1, "B", right=1.0)
    log.append(replace(plain, trajectory=replace(plain.trajectory, extra={})))
    with pytest.raises(UserError, match=r"none of 1 episodes has a draft .*gate\.mode=measure"):
        calibrate_file(log.path, tmp_path / "gate.json")
    with pytest.raises(UserError, match=r"none\.jsonl is no log"):
        calibrate_file(tmp_path / "none.jsonl", tmp_path / "gate.json")
