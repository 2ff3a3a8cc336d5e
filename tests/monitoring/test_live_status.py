from __future__ import annotations

import json

import pytest

from vz_ray.monitoring.live_status import LiveStatus, RunState
from vz_ray.utils.errors import UserError


def test_what_is_written_is_read_back(tmp_path):
    live = LiveStatus(run="a", step=3, max_steps=9, rollout={"playing": 4}, eta_s=12.5)
    live.write(tmp_path / "live.json")
    assert LiveStatus.read(tmp_path / "live.json") == live
    assert live.written_s > 1.6e9


def test_a_key_of_another_version_is_left_out(tmp_path):
    (tmp_path / "live.json").write_text(json.dumps({"run": "a", "moon": "full"}))
    assert LiveStatus.read(tmp_path / "live.json") == LiveStatus(run="a")


def test_none_where_there_is_none(tmp_path):
    assert LiveStatus.read(tmp_path / "live.json") is None


@pytest.mark.parametrize("text", ["{", "[1]", "nonsense"])
def test_what_is_none_is_named(tmp_path, text):
    (tmp_path / "live.json").write_text(text)
    with pytest.raises(UserError, match=r"live\.json cannot be read .* delete it"):
        LiveStatus.read(tmp_path / "live.json")


@pytest.mark.parametrize(
    ("state", "age_s", "every_s", "standing"),
    [
        ("running", 29, 1, RunState.RUNNING),
        ("running", 31, 1, RunState.STALE),
        ("running", 100, 20, RunState.RUNNING),
        ("running", 121, 20, RunState.STALE),
        ("ended", 1e6, 1, RunState.ENDED),
        ("failed", 1e6, 1, RunState.FAILED),
        ("running", -50, 1, RunState.RUNNING),
    ],
)
def test_a_run_is_silent_when_its_heartbeat_is_late(state, age_s, every_s, standing):
    live = LiveStatus(written_s=1000.0, heartbeat_interval_s=every_s, state=state)
    assert live.state_at(1000.0 + age_s) is standing
