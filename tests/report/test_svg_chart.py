"""Charts, timelines and thumbnails."""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vz_ray.env.trajectory import (
    EpisodeId,
    EpisodeStatus,
    ExternalAction,
    RejectedZoom,
    TokenContext,
    Trajectory,
    Turn,
    ZoomErrorKind,
)
from vz_ray.report.markup import format_clock
from vz_ray.report.svg_chart import HEIGHT, WIDTH, ChartSeries, downsample, line_chart, ticks
from vz_ray.report.thumbnails import encode_data_uri
from vz_ray.report.timeline import timeline, timeline_length_s
from vz_ray.video.frame import FrameRef, ZoomRequest

values = st.floats(-1e12, 1e12)


def svg_of(figure: str) -> ET.Element:
    found = re.search(r"<svg.*</svg>", figure, re.DOTALL)
    assert found is not None
    return ET.fromstring(found[0])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10_000), values), min_size=1, max_size=20), st.booleans())
def test_points_are_inside_the_drawing(points: list[tuple[float, float]], log: bool) -> None:
    figure = line_chart("t", [ChartSeries("a", sorted(points), markers=True)], y_log=log)
    if log and not any(y > 1e-300 for _, y in points):
        assert figure == ""
        return
    for dot in svg_of(figure).iter("circle"):
        assert 0 <= float(dot.attrib["cx"]) <= WIDTH
        assert 0 <= float(dot.attrib["cy"]) <= HEIGHT


def test_larger_values_are_drawn_higher() -> None:
    figure = line_chart("t", [ChartSeries("a", [(0, 1.0), (1, 2.0)], markers=True)])
    low, high = (float(dot.attrib["cy"]) for dot in svg_of(figure).iter("circle"))
    assert high < low


def test_chart_without_data_is_empty() -> None:
    assert line_chart("t", [ChartSeries("a", [])]) == ""
    assert line_chart("t", [ChartSeries("a", [(0, float("nan"))])]) == ""


def test_legend_appears_with_several_series() -> None:
    one, two = ChartSeries("first", [(0, 1)]), ChartSeries("second", [(0, 2)], color=2)
    assert "legend" not in line_chart("t", [one])
    assert "second" in line_chart("t", [one, two])


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_in_range(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert 1 <= len(found) <= 7
    assert all(low - span * 1e-6 <= t <= low + span * (1 + 1e-6) for t in found)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), max_size=1000), st.integers(1, 100))
def test_downsampling_keeps_the_bounds(points: list[tuple[float, float]], most: int) -> None:
    found = downsample(points, most)
    assert len(found) <= most
    if points:
        assert min(y for _, y in points) - 1e-6 <= min(y for _, y in found)
        assert max(y for _, y in found) <= max(y for _, y in points) + 1e-6


def ref(time: float) -> FrameRef:
    return FrameRef("blake3:v", "v.mp4", 0, time, 28, 28, "bicubic", "av", "00")


def looked(times: list[float], zoom: ZoomRequest | None) -> Trajectory:
    prompt = TokenContext((1,) * len(times), ((1, 2, 2),) * len(times), tuple(map(ref, times)), pad_id=1, merge_size=2)
    turn = Turn(ExternalAction("z", ()), "z", zoom, TokenContext(()))
    return Trajectory(EpisodeId(0, "t", 0), "clean", prompt, (turn,), EpisodeStatus.ANSWERED)


def test_overview_covers_the_whole_video() -> None:
    assert timeline_length_s(looked([0, 10, 20, 30], None), []) == 40
    assert timeline_length_s(looked([0, 10], ZoomRequest(20, 25, 1)), [(3, 31)]) == 31
    assert timeline_length_s(looked([], None), []) > 0


@pytest.mark.parametrize("zoom", [ZoomRequest(0, 4, 2), ZoomRequest(36, 40, 2), ZoomRequest(18, 18.01, 8)])
def test_bar_matches_the_zoom(zoom: ZoomRequest) -> None:
    drawn = timeline(looked([0, 10, 20, 30], zoom), [])
    found = re.search(r'class="zoom" style="left:([\d.]+)%;width:([\d.]+)%', drawn)
    assert found is not None
    assert float(found[1]) == pytest.approx(100 * zoom.start_s / 40, abs=0.01)
    assert float(found[2]) == pytest.approx(100 * (zoom.end_s - zoom.start_s) / 40, abs=0.01)
    assert f"turn 1 · {zoom.fps:g} fps" in drawn


@pytest.mark.parametrize(
    ("zoom", "left", "width"),
    [
        (ZoomRequest(30, 50, 2), 75, 25),
        (ZoomRequest(60, 90, 2), 99, 0),
        (ZoomRequest(20, 10, 2), 25, 25),
        (ZoomRequest(-5, 4, 2), 0, 10),
    ],
)
def test_rejected_zoom_is_drawn_at_its_request(zoom: ZoomRequest, left: float, width: float) -> None:
    trajectory = looked([0, 10, 20, 30], None)
    rejected = RejectedZoom(ZoomErrorKind.OUT_OF_RANGE, "it is <outside>", zoom)
    turn = replace(trajectory.turns[0], zoom=rejected)
    html = timeline(replace(trajectory, turns=(turn,)), [])
    match = re.search(r'class="zoom refused" style="left:([\d.]+)%;width:([\d.]+)%" title="([^"]+)"', html)
    assert match is not None
    assert (float(match[1]), float(match[2])) == (pytest.approx(left), pytest.approx(width))
    assert match[3].endswith("at 2 fps, rejected: it is &lt;outside&gt;")
    assert "of 0:40: 0 zooms" in html


def decode_data_uri(uri: str) -> np.ndarray:
    with av.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])), "r") as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def test_tiny_frame_is_embedded_losslessly() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (28, 56, 3), dtype=np.uint8)
    uri = encode_data_uri(rgb, 160)
    assert uri.startswith("data:image/png")
    assert np.array_equal(decode_data_uri(uri), rgb)


def test_large_frame_is_downscaled() -> None:
    rgb = np.zeros((252, 504, 3), np.uint8)
    rgb[:, 252:] = (200, 80, 40)
    uri = encode_data_uri(rgb, 160)
    small = decode_data_uri(uri)
    assert uri.startswith("data:image/jpeg")
    assert small.shape == (80, 160, 3)
    assert np.abs(small[40, 140].astype(int) - (200, 80, 40)).max() < 12
    assert small[40, 20].max() < 12


@pytest.mark.parametrize(("seconds", "words"), [(0, "0:00"), (75.5, "1:15.5"), (59.96, "1:00"), (3661, "1:01:01")])
def test_format_clock(seconds: float, words: str) -> None:
    assert format_clock(seconds) == words
