"""`live.json`: round trip, invalid files and staleness."""

from __future__ import annotations

import json

import pytest

from vz_ray.monitoring.live_status import LiveStatus, RunState
from vz_ray.utils.errors import UserError


def test_status_round_trips(tmp_path):
    status = LiveStatus(run="a", step=3, max_steps=9, rollout={"running": 4}, eta_s=12.5)
    status.write(tmp_path / "live.json")
    assert LiveStatus.read(tmp_path / "live.json") == status
    assert status.written_s > 1.6e9


def test_unknown_field_is_ignored(tmp_path):
    (tmp_path / "live.json").write_text(json.dumps({"run": "a", "moon": "full"}))
    assert LiveStatus.read(tmp_path / "live.json") == LiveStatus(run="a")


def test_missing_file_reads_as_none(tmp_path):
    assert LiveStatus.read(tmp_path / "live.json") is None


@pytest.mark.parametrize("text", ["{", "[1]", "nonsense"])
def test_invalid_file_raises_user_error(tmp_path, text):
    (tmp_path / "live.json").write_text(text)
    with pytest.raises(UserError, match=r"cannot read .*live\.json.*delete it"):
        LiveStatus.read(tmp_path / "live.json")


@pytest.mark.parametrize(
    ("state", "age_s", "interval_s", "expected"),
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
def test_running_status_becomes_stale(state, age_s, interval_s, expected):
    status = LiveStatus(written_s=1000.0, heartbeat_interval_s=interval_s, state=state)
    assert status.state_at(1000.0 + age_s) is expected
