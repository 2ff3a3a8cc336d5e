"""Formatting of durations."""

from __future__ import annotations

import pytest

from vz_ray.utils.durations import format_duration


@pytest.mark.parametrize(("seconds", "text"), [(3.41, "3.4 s"), (75, "1 min 15 s"), (3660, "1 h 01 min")])
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
