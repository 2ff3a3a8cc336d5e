from __future__ import annotations

import pytest

from tests.distill.episode_records import REFUSED, make_record
from vz_ray.distill.zoom_patterns import ZoomPattern, classify_pattern
from vz_ray.video.frame import ZoomRequest

WIDE, NARROW, ELSEWHERE, BESIDE = (
    ZoomRequest(0, 16, 1),
    ZoomRequest(4, 8, 2),
    ZoomRequest(40, 48, 2),
    ZoomRequest(16, 24, 1),
)


@pytest.mark.parametrize(
    ("zooms", "pattern"),
    [
        ((), ZoomPattern.NO_ZOOM),
        ((REFUSED,), ZoomPattern.NO_ZOOM),
        ((REFUSED, REFUSED), ZoomPattern.NO_ZOOM),
        ((WIDE,), ZoomPattern.DIRECT),
        ((WIDE, REFUSED), ZoomPattern.DIRECT),
        ((WIDE, NARROW), ZoomPattern.PROGRESSIVE),
        ((WIDE, ZoomRequest(0, 16, 2)), ZoomPattern.PROGRESSIVE),
        ((WIDE, ZoomRequest(12, 20, 2)), ZoomPattern.PROGRESSIVE),
        ((WIDE, NARROW, ZoomRequest(4, 6, 4)), ZoomPattern.PROGRESSIVE),
        ((WIDE, ELSEWHERE), ZoomPattern.CORRECTED),
        ((WIDE, BESIDE), ZoomPattern.CORRECTED),
        ((WIDE, NARROW, ELSEWHERE), ZoomPattern.CORRECTED),
        ((WIDE, ELSEWHERE, ZoomRequest(42, 44, 4)), ZoomPattern.CORRECTED),
        ((REFUSED, WIDE), ZoomPattern.CORRECTED),
        ((WIDE, REFUSED, NARROW), ZoomPattern.CORRECTED),
    ],
)
def test_patterns_are_read_off_the_zooms(zooms, pattern):
    assert classify_pattern(make_record(*zooms).trajectory) is pattern
