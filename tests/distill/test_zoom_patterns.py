from __future__ import annotations

import pytest

from tests.distill.episode_records import REJECTED, make_record
from vz_ray.distill.zoom_patterns import ZoomPattern, classify_pattern
from vz_ray.video.frame import ZoomRequest

WIDE, NARROW, DISJOINT, ADJACENT = (
    ZoomRequest(0, 16, 1),
    ZoomRequest(4, 8, 2),
    ZoomRequest(40, 48, 2),
    ZoomRequest(16, 24, 1),
)


@pytest.mark.parametrize(
    ("zooms", "pattern"),
    [
        ((), ZoomPattern.NO_ZOOM),
        ((REJECTED,), ZoomPattern.NO_ZOOM),
        ((REJECTED, REJECTED), ZoomPattern.NO_ZOOM),
        ((WIDE,), ZoomPattern.DIRECT),
        ((WIDE, REJECTED), ZoomPattern.DIRECT),
        ((WIDE, NARROW), ZoomPattern.PROGRESSIVE),
        ((WIDE, ZoomRequest(0, 16, 2)), ZoomPattern.PROGRESSIVE),
        ((WIDE, ZoomRequest(12, 20, 2)), ZoomPattern.PROGRESSIVE),
        ((WIDE, NARROW, ZoomRequest(4, 6, 4)), ZoomPattern.PROGRESSIVE),
        ((WIDE, DISJOINT), ZoomPattern.CORRECTED),
        ((WIDE, ADJACENT), ZoomPattern.CORRECTED),
        ((WIDE, NARROW, DISJOINT), ZoomPattern.CORRECTED),
        ((WIDE, DISJOINT, ZoomRequest(42, 44, 4)), ZoomPattern.CORRECTED),
        ((REJECTED, WIDE), ZoomPattern.CORRECTED),
        ((WIDE, REJECTED, NARROW), ZoomPattern.CORRECTED),
    ],
)
def test_pattern_follows_from_zooms(zooms, pattern):
    assert classify_pattern(make_record(*zooms).trajectory) is pattern
