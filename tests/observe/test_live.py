from __future__ import annotations

import json

import pytest

from vz_ray.observe.errors import UserError
from vz_ray.observe.live import Live, State


def test_what_is_written_is_read_back(tmp_path):
    live = Live(run="a", iteration=3, iterations=9, fleet={"playing": 4}, left_s=12.5)
    live.write(tmp_path / "live.json")
    assert Live.read(tmp_path / "live.json") == live
    assert live.written_s > 1.6e9


def test_a_key_of_another_version_is_left_out(tmp_path):
    (tmp_path / "live.json").write_text(json.dumps({"run": "a", "moon": "full"}))
    assert Live.read(tmp_path / "live.json") == Live(run="a")


def test_none_where_there_is_none(tmp_path):
    assert Live.read(tmp_path / "live.json") is None


@pytest.mark.parametrize("text", ["{", "[1]", "nonsense"])
def test_what_is_none_is_named(tmp_path, text):
    (tmp_path / "live.json").write_text(text)
    with pytest.raises(UserError, match=r"live\.json cannot be read .* delete it"):
        Live.read(tmp_path / "live.json")


@pytest.mark.parametrize(
    ("state", "age_s", "every_s", "standing"),
    [
        ("running", 29, 1, State.RUNNING),
        ("running", 31, 1, State.SILENT),
        ("running", 100, 20, State.RUNNING),
        ("running", 121, 20, State.SILENT),
        ("ended", 1e6, 1, State.ENDED),
        ("failed", 1e6, 1, State.FAILED),
        ("running", -50, 1, State.RUNNING),
    ],
)
def test_a_run_is_silent_when_its_heartbeat_is_late(state, age_s, every_s, standing):
    live = Live(written_s=1000.0, every_s=every_s, state=state)
    assert live.standing(1000.0 + age_s) is standing
