"""Every malformed zoom gets its own refusal; every good one is read as written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vz_ray.episode.trajectory import ZoomFault, ZoomRefused
from vz_ray.episode.zoom_call import at_rate, read_turn
from vz_ray.video.frame import Zoom


def call(body: str) -> str:
    return f"<think>look</think><video_zoom>{body}</video_zoom>"


def read(text: str, duration_s: float = 100.0, max_frames: int = 16):
    return read_turn(text, duration_s=duration_s, max_frames=max_frames)


def test_a_good_call_is_read_as_written():
    assert read(call(' {"segment": [10, 18.5], "fps": 1.5} ')).zoom == Zoom(10.0, 18.5, 1.5)


@pytest.mark.parametrize(
    ("segment", "asked", "shown"),
    [
        ([10, 18], 1, 2.0),
        ([10, 30], 4, 0.8),  # more than 16 frames at either rate: as many as there may be
        ([10, 10.25], 4, 4.0),  # less than one frame at 2: one
    ],
)
def test_a_fixed_rate_stands_in_for_the_one_asked_for(segment, asked, shown):
    said = read_turn(
        call(f'{{"segment": {segment}, "fps": {asked}}}'), duration_s=100, max_frames=16, fixed_fps=2
    )
    assert said.zoom == Zoom(*map(float, segment), shown)
    assert said.asked_fps == (None if asked == shown else asked)
    assert 1 <= said.zoom.frame_count <= 16


@pytest.mark.parametrize(
    ("segment", "asked", "fault"),
    [
        ([10, 10], 1, ZoomFault.EMPTY),
        ([10, 20], 0, ZoomFault.EMPTY),
        ([10, 20], -1, ZoomFault.NEGATIVE),
        ([20, 10], 1, ZoomFault.REVERSED),
        ([10, 200], 1, ZoomFault.OUTSIDE),
        ([0, 5e-324], 1, ZoomFault.TOO_FEW_FRAMES),
    ],
)
def test_a_fixed_rate_mends_no_other_fault(segment, asked, fault):
    said = read_turn(
        call(f'{{"segment": {segment}, "fps": {asked}}}'), duration_s=100, max_frames=16, fixed_fps=2
    )
    assert isinstance(said.zoom, ZoomRefused)
    assert said.zoom.fault is fault


@pytest.mark.parametrize(("segment", "fps"), [("[0, 5e-324]", "1"), ("[0, 1e-306]", "1e308")])
def test_a_segment_of_next_to_no_length_is_refused_whatever_the_rate(segment, fps):
    assert isinstance(read(call(f'{{"segment": {segment}, "fps": {fps}}}')).zoom, ZoomRefused)


@given(st.floats(0, 3600), st.floats(0.01, 3600), st.floats(0.01, 120), st.integers(1, 64))
def test_a_fixed_rate_always_shows_from_one_frame_to_the_most(start, span, fps, most):
    zoom = at_rate(Zoom(start, start + span, 1.0), fps, most)
    assert 1 <= zoom.frame_count <= most
    assert (zoom.start_s, zoom.end_s) == (start, start + span)


def test_an_answer_is_the_last_span():
    said = read("<answer>A</answer> no: <answer> B </answer>")
    assert (said.zoom, said.answer) == (None, "B")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (call("not json"), ZoomFault.BROKEN_JSON),
        (call('{"segment": [1, 2], "fps": 1'), ZoomFault.BROKEN_JSON),
        ('<video_zoom>{"segment": [1, 2], "fps": 1}', ZoomFault.BROKEN_JSON),
        (call("[" * 5000), ZoomFault.BROKEN_JSON),
        (call('{"segment": [1, 2]}'), ZoomFault.WRONG_KEYS),
        (call('{"segment": [1, 2], "fps": 1, "zoom": 3}'), ZoomFault.WRONG_KEYS),
        (call('{"segment": [1, 2], "fps": 1, "fps": 2}'), ZoomFault.WRONG_KEYS),
        (call("[1, 2, 1]"), ZoomFault.WRONG_KEYS),
        (call('{"segment": [1, 2, 3], "fps": 1}'), ZoomFault.NOT_NUMBERS),
        (call('{"segment": ["1", 2], "fps": 1}'), ZoomFault.NOT_NUMBERS),
        (call('{"segment": [1, 2], "fps": true}'), ZoomFault.NOT_NUMBERS),
        (call('{"segment": [1, 2], "fps": null}'), ZoomFault.NOT_NUMBERS),
        (call('{"segment": [1, NaN], "fps": 1}'), ZoomFault.NOT_FINITE),
        (call('{"segment": [1, 2], "fps": Infinity}'), ZoomFault.NOT_FINITE),
        (call('{"segment": [1, 2], "fps": 1' + "0" * 400 + "}"), ZoomFault.NOT_FINITE),
        (call('{"segment": [-1, 2], "fps": 1}'), ZoomFault.NEGATIVE),
        (call('{"segment": [1, 2], "fps": -1}'), ZoomFault.NEGATIVE),
        (call('{"segment": [5, 2], "fps": 1}'), ZoomFault.REVERSED),
        (call('{"segment": [5, 5], "fps": 1}'), ZoomFault.EMPTY),
        (call('{"segment": [5, 6], "fps": 0}'), ZoomFault.EMPTY),
        (call('{"segment": [100, 101], "fps": 1}'), ZoomFault.OUTSIDE),
        (call('{"segment": [99, 101], "fps": 1}'), ZoomFault.OUTSIDE),
        (call('{"segment": [0, 17], "fps": 1}'), ZoomFault.TOO_MANY_FRAMES),
        (call('{"segment": [0, 1], "fps": 1e300}'), ZoomFault.TOO_MANY_FRAMES),
        (call('{"segment": [0, 1], "fps": 0.5}'), ZoomFault.TOO_FEW_FRAMES),
        (call('{"segment": [1, 2], "fps": 1}') * 2, ZoomFault.TWO_CALLS),
        (call('{"segment": [1, 2], "fps": 1}') + "<answer>A</answer>", ZoomFault.WITH_ANSWER),
    ],
)
def test_each_kind_of_bad_zoom_has_its_own_refusal(text, fault):
    refused = read(text).zoom
    assert isinstance(refused, ZoomRefused)
    assert refused.fault is fault
    assert 10 < len(refused.message) < 200


def test_too_many_frames_names_an_fps_that_would_fit():
    refused = read(call('{"segment": [0, 30], "fps": 2}')).zoom
    assert "fps up to 0.53" in refused.message
    assert isinstance(read(call('{"segment": [0, 30], "fps": 0.53}')).zoom, Zoom)


@given(st.text(max_size=200))
def test_any_text_is_read_without_an_exception(text):
    read(text)
    read(call(text))


@given(
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(allow_nan=True, allow_infinity=True),
)
def test_whatever_is_admitted_fits_the_video_and_the_frame_limit(start, end, fps):
    zoom = read(call(f'{{"segment": [{start}, {end}], "fps": {fps}}}')).zoom
    if isinstance(zoom, Zoom):
        assert 0 <= zoom.start_s < zoom.end_s <= 100.05
        assert 1 <= zoom.frame_count <= 16


@pytest.mark.parametrize(
    ("segment", "fps", "fault"),
    [
        ([20, 10], 1, ZoomFault.REVERSED),
        ([-5, 10], 1, ZoomFault.NEGATIVE),
        ([90, 200], 1, ZoomFault.OUTSIDE),
        ([10, 90], 8, ZoomFault.TOO_MANY_FRAMES),
        ([10, 10.5], 1, ZoomFault.TOO_FEW_FRAMES),
    ],
)
def test_a_refusal_says_what_was_asked_for(segment, fps, fault):
    refused = read(call(f'{{"segment": {segment}, "fps": {fps}}}')).zoom
    assert isinstance(refused, ZoomRefused)
    assert (refused.fault, refused.asked) == (fault, Zoom(*map(float, segment), float(fps)))


def test_a_call_beside_an_answer_is_refused_with_what_it_asked_for():
    refused = read(call('{"segment": [1, 2], "fps": 4}') + "<answer>A</answer>").zoom
    assert (refused.fault, refused.asked) == (ZoomFault.WITH_ANSWER, Zoom(1.0, 2.0, 4.0))


@pytest.mark.parametrize(
    "text",
    [
        call("{"),
        call('{"segment": [1, 2]}'),
        call('{"segment": [1, "2"], "fps": 1}'),
        call("{}") + "<answer>A</answer>",
        2 * call('{"segment": [1, 2], "fps": 4}'),
    ],
)
def test_a_refusal_of_what_cannot_be_read_says_no_more_than_why(text):
    assert read(text).zoom.asked is None


def test_a_refusal_at_a_fixed_rate_is_of_the_zoom_at_that_rate():
    text = call('{"segment": [90, 200], "fps": 4}')
    said = read_turn(text, duration_s=100, max_frames=16, fixed_fps=2)
    assert said.zoom.asked == Zoom(90.0, 200.0, 4.0)  # it is nowhere, so nothing was set
