from __future__ import annotations

import pytest

from tests.coldstart.distill.making import REFUSED, record
from vz_ray.coldstart.distill.patterns import Pattern, pattern_of
from vz_ray.video.frame import Zoom

WIDE, NARROW, ELSEWHERE, BESIDE = Zoom(0, 16, 1), Zoom(4, 8, 2), Zoom(40, 48, 2), Zoom(16, 24, 1)


@pytest.mark.parametrize(
    ("zooms", "pattern"),
    [
        ((), Pattern.NO_ZOOM),
        ((REFUSED,), Pattern.NO_ZOOM),
        ((REFUSED, REFUSED), Pattern.NO_ZOOM),
        ((WIDE,), Pattern.DIRECT),
        ((WIDE, REFUSED), Pattern.DIRECT),
        ((WIDE, NARROW), Pattern.PROGRESSIVE),
        ((WIDE, Zoom(0, 16, 2)), Pattern.PROGRESSIVE),
        ((WIDE, Zoom(12, 20, 2)), Pattern.PROGRESSIVE),
        ((WIDE, NARROW, Zoom(4, 6, 4)), Pattern.PROGRESSIVE),
        ((WIDE, ELSEWHERE), Pattern.CORRECTED),
        ((WIDE, BESIDE), Pattern.CORRECTED),
        ((WIDE, NARROW, ELSEWHERE), Pattern.CORRECTED),
        ((WIDE, ELSEWHERE, Zoom(42, 44, 4)), Pattern.CORRECTED),
        ((REFUSED, WIDE), Pattern.CORRECTED),
        ((WIDE, REFUSED, NARROW), Pattern.CORRECTED),
    ],
)
def test_patterns_are_read_off_the_zooms(zooms, pattern):
    assert pattern_of(record(*zooms).trajectory) is pattern
