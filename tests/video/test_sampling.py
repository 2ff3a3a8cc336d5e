"""Frame times of overview and zoom requests."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vz_ray.video.errors import InvalidFrameRequestError
from vz_ray.video.frame import OverviewRequest, VideoInfo, ZoomRequest
from vz_ray.video.sampling import overview_times, zoom_times

INFO = VideoInfo("blake3:0", "talk.mp4", 0, duration_s=100.0, fps=25.0, width=640, height=360)


def test_overview_samples_at_fps_from_zero() -> None:
    assert overview_times(OverviewRequest(fps=0.5), INFO) == [2.0 * k for k in range(50)]
    assert overview_times(OverviewRequest(fps=0.5), replace(INFO, duration_s=0.3)) == [0.0]


def test_overview_above_max_frames_is_spread_from_start() -> None:
    assert overview_times(OverviewRequest(fps=0.5, max_frames=4), INFO) == [0.0, 25.0, 50.0, 75.0]


@given(
    st.floats(0.05, 40_000),
    st.floats(0.01, 30),
    st.integers(1, 256),
    st.sampled_from(["starts", "endpoints"]),
)
def test_overview_is_within_video_and_max_frames(duration: float, fps: float, max_frames: int, spread: str) -> None:
    info = replace(INFO, duration_s=duration)
    times = overview_times(OverviewRequest(fps, max_frames, spread), info)
    assert 1 <= len(times) <= max_frames
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] < duration + 1 / info.fps


def test_endpoints_samples_native_frames_first_to_last() -> None:
    native = [round(t * 25 - 0.5) for t in overview_times(OverviewRequest(0.5, 64, "endpoints"), INFO)]
    assert native == list(range(0, 2500, 50))
    native = [round(t * 25 - 0.5) for t in overview_times(OverviewRequest(0.5, 4, "endpoints"), INFO)]
    assert native == [0, 833, 1666, 2499]


def test_zoom_interval_is_half_open() -> None:
    assert zoom_times(ZoomRequest(10, 12, fps=2), INFO) == [10.0, 10.5, 11.0, 11.5]
    assert len(zoom_times(ZoomRequest(0, 0.3, fps=10), INFO)) == 3


def test_inclusive_zoom_samples_native_frames_and_clamps() -> None:
    native = [round(t * 25 - 0.5) for t in zoom_times(ZoomRequest(10, 12, fps=2, inclusive=True), INFO)]
    assert native == [250, 266, 283, 300]
    native = [round(t * 25 - 0.5) for t in zoom_times(ZoomRequest(99, 103, fps=1, inclusive=True), INFO)]
    assert native == [2475, 2483, 2491, 2499]


@pytest.mark.parametrize(
    ("zoom", "reason"),
    [
        (ZoomRequest(12, 10, 2), "reversed"),
        (ZoomRequest(10, 10, 2), "holds no frame"),
        (ZoomRequest(10, 10.1, 2), "holds no frame"),
        (ZoomRequest(-1, 3, 2), "starts before 0"),
        (ZoomRequest(100, 104, 2), "must lie within 0 and 100.00"),
        (ZoomRequest(98, 104, 2), "must lie within 0 and 100.00"),
        (ZoomRequest(math.nan, 3, 2), "finite"),
        (ZoomRequest(0, math.inf, 2), "finite"),
        (ZoomRequest(0, 3, 0), "fps must be a positive number"),
        (ZoomRequest(0, 3, -1), "fps must be a positive number"),
        (ZoomRequest(0, 3, math.nan), "fps must be a positive number"),
    ],
)
def test_invalid_zoom_explains_the_cause_to_the_model(zoom: ZoomRequest, reason: str) -> None:
    with pytest.raises(InvalidFrameRequestError) as raised:
        zoom_times(zoom, INFO)
    assert reason in raised.value.model_message


def test_zoom_may_end_at_the_rounded_duration() -> None:
    info = replace(INFO, duration_s=99.996)
    assert len(zoom_times(ZoomRequest(96, 100, 2), info)) == 8


@pytest.mark.parametrize(
    "request_",
    [
        OverviewRequest(fps=0),
        OverviewRequest(fps=math.nan),
        OverviewRequest(max_frames=0),
        OverviewRequest(spread="random"),
    ],
)
def test_invalid_overview_is_rejected(request_: OverviewRequest) -> None:
    with pytest.raises(InvalidFrameRequestError):
        overview_times(request_, INFO)
