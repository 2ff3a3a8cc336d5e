"""Quarantine: failures are counted per decoder death, and a success resets the count."""

from __future__ import annotations

import pytest

from vz_ray.decode.quarantine import Quarantine
from vz_ray.video.errors import VideoQuarantinedError


def test_video_is_quarantined_after_consecutive_deaths() -> None:
    quarantine = Quarantine(threshold=2)
    quarantine.record_failure("a.mp4", "decoder died", quarantine.current_life(0))
    assert quarantine.is_suspect("a.mp4")
    quarantine.check("a.mp4")
    quarantine.record_success("a.mp4")
    quarantine.record_failure("a.mp4", "decoder died", quarantine.current_life(0))
    quarantine.check("a.mp4")
    quarantine.record_failure("a.mp4", "decoder died", quarantine.current_life(0))
    with pytest.raises(VideoQuarantinedError, match=r"a\.mp4 is quarantined: decoder died, the last of 2"):
        quarantine.check("a.mp4")
    assert list(quarantine.reasons) == ["a.mp4"]


def test_requests_lost_in_one_death_count_once() -> None:
    quarantine = Quarantine(threshold=2)
    life = quarantine.current_life(0)
    for _ in range(3):
        quarantine.record_failure("a.mp4", "decoder died", life)
    quarantine.check("a.mp4")
    assert quarantine.current_life(0) != life
