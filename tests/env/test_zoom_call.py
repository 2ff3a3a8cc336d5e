"""Parser of zoom calls."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vz_ray.env.trajectory import RejectedZoom, ZoomErrorKind
from vz_ray.env.zoom_call import parse_turn, remove_reasoning, with_fps
from vz_ray.video.frame import ZoomRequest


def call(body: str) -> str:
    return f"<think>look</think><video_zoom>{body}</video_zoom>"


def parse(text: str, duration_s: float = 100.0, max_frames: int = 16):
    return parse_turn(text, duration_s=duration_s, max_frames=max_frames)


def test_valid_call_is_parsed():
    assert parse(call(' {"segment": [10, 18.5], "fps": 1.5} ')).zoom == ZoomRequest(10.0, 18.5, 1.5)


@pytest.mark.parametrize(
    ("segment", "requested", "expected"),
    [
        ([10, 18], 1, 2.0),
        ([10, 30], 4, 0.8),  # more than 16 frames at either rate: the maximum
        ([10, 10.25], 4, 4.0),  # less than one frame at 2 fps: one frame
    ],
)
def test_fixed_fps_overrides_the_call(segment, requested, expected):
    parsed = parse_turn(
        call(f'{{"segment": {segment}, "fps": {requested}}}'), duration_s=100, max_frames=16, fixed_fps=2
    )
    assert parsed.zoom == ZoomRequest(*map(float, segment), expected)
    assert parsed.requested_fps == (None if requested == expected else requested)
    assert 1 <= parsed.zoom.num_frames <= 16


@pytest.mark.parametrize(
    ("segment", "requested", "kind"),
    [
        ([10, 10], 1, ZoomErrorKind.EMPTY),
        ([10, 20], 0, ZoomErrorKind.EMPTY),
        ([10, 20], -1, ZoomErrorKind.NEGATIVE),
        ([20, 10], 1, ZoomErrorKind.REVERSED),
        ([10, 200], 1, ZoomErrorKind.OUT_OF_RANGE),
        ([0, 5e-324], 1, ZoomErrorKind.TOO_FEW_FRAMES),
    ],
)
def test_fixed_fps_keeps_other_errors(segment, requested, kind):
    parsed = parse_turn(
        call(f'{{"segment": {segment}, "fps": {requested}}}'), duration_s=100, max_frames=16, fixed_fps=2
    )
    assert isinstance(parsed.zoom, RejectedZoom)
    assert parsed.zoom.kind is kind


@pytest.mark.parametrize(("segment", "fps"), [("[0, 5e-324]", "1"), ("[0, 1e-306]", "1e308")])
def test_tiny_segment_is_rejected(segment, fps):
    assert isinstance(parse(call(f'{{"segment": {segment}, "fps": {fps}}}')).zoom, RejectedZoom)


@given(st.floats(0, 3600), st.floats(0.01, 3600), st.floats(0.01, 120), st.integers(1, 64))
def test_fixed_fps_respects_frame_limits(start, span, fps, max_frames):
    zoom = with_fps(ZoomRequest(start, start + span, 1.0), fps, max_frames)
    assert 1 <= zoom.num_frames <= max_frames
    assert (zoom.start_s, zoom.end_s) == (start, start + span)


def test_answer_is_the_last_span():
    parsed = parse("<answer>A</answer> no: <answer> B </answer>")
    assert (parsed.zoom, parsed.answer) == (None, "B")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (call("not json"), ZoomErrorKind.INVALID_JSON),
        (call('{"segment": [1, 2], "fps": 1'), ZoomErrorKind.INVALID_JSON),
        ('<video_zoom>{"segment": [1, 2], "fps": 1}', ZoomErrorKind.INVALID_JSON),
        (call("[" * 5000), ZoomErrorKind.INVALID_JSON),
        (call('{"segment": [1, 2]}'), ZoomErrorKind.WRONG_KEYS),
        (call('{"segment": [1, 2], "fps": 1, "zoom": 3}'), ZoomErrorKind.WRONG_KEYS),
        (call('{"segment": [1, 2], "fps": 1, "fps": 2}'), ZoomErrorKind.WRONG_KEYS),
        (call("[1, 2, 1]"), ZoomErrorKind.WRONG_KEYS),
        (call('{"segment": [1, 2, 3], "fps": 1}'), ZoomErrorKind.NOT_NUMBERS),
        (call('{"segment": ["1", 2], "fps": 1}'), ZoomErrorKind.NOT_NUMBERS),
        (call('{"segment": [1, 2], "fps": true}'), ZoomErrorKind.NOT_NUMBERS),
        (call('{"segment": [1, 2], "fps": null}'), ZoomErrorKind.NOT_NUMBERS),
        (call('{"segment": [1, NaN], "fps": 1}'), ZoomErrorKind.NOT_FINITE),
        (call('{"segment": [1, 2], "fps": Infinity}'), ZoomErrorKind.NOT_FINITE),
        (call('{"segment": [1, 2], "fps": 1' + "0" * 400 + "}"), ZoomErrorKind.NOT_FINITE),
        (call('{"segment": [-1, 2], "fps": 1}'), ZoomErrorKind.NEGATIVE),
        (call('{"segment": [1, 2], "fps": -1}'), ZoomErrorKind.NEGATIVE),
        (call('{"segment": [5, 2], "fps": 1}'), ZoomErrorKind.REVERSED),
        (call('{"segment": [5, 5], "fps": 1}'), ZoomErrorKind.EMPTY),
        (call('{"segment": [5, 6], "fps": 0}'), ZoomErrorKind.EMPTY),
        (call('{"segment": [100, 101], "fps": 1}'), ZoomErrorKind.OUT_OF_RANGE),
        (call('{"segment": [99, 101], "fps": 1}'), ZoomErrorKind.OUT_OF_RANGE),
        (call('{"segment": [0, 17], "fps": 1}'), ZoomErrorKind.TOO_MANY_FRAMES),
        (call('{"segment": [0, 1], "fps": 1e300}'), ZoomErrorKind.TOO_MANY_FRAMES),
        (call('{"segment": [0, 1], "fps": 0.5}'), ZoomErrorKind.TOO_FEW_FRAMES),
        (call('{"segment": [1, 2], "fps": 1}') * 2, ZoomErrorKind.MULTIPLE_CALLS),
        (call('{"segment": [1, 2], "fps": 1}') + "<answer>A</answer>", ZoomErrorKind.CALL_WITH_ANSWER),
    ],
)
def test_malformed_call_has_its_error_kind(text, kind):
    rejected = parse(text).zoom
    assert isinstance(rejected, RejectedZoom)
    assert rejected.kind is kind
    assert 10 < len(rejected.message) < 200


def test_too_many_frames_suggests_a_valid_fps():
    rejected = parse(call('{"segment": [0, 30], "fps": 2}')).zoom
    assert "fps up to 0.53" in rejected.message
    assert isinstance(parse(call('{"segment": [0, 30], "fps": 0.53}')).zoom, ZoomRequest)


@given(st.text(max_size=200))
def test_parser_never_raises(text):
    parse(text)
    parse(call(text))


@given(
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(allow_nan=True, allow_infinity=True),
)
def test_accepted_zoom_is_within_limits(start, end, fps):
    zoom = parse(call(f'{{"segment": [{start}, {end}], "fps": {fps}}}')).zoom
    if isinstance(zoom, ZoomRequest):
        assert 0 <= zoom.start_s < zoom.end_s <= 100.05
        assert 1 <= zoom.num_frames <= 16


@pytest.mark.parametrize(
    ("segment", "fps", "kind"),
    [
        ([20, 10], 1, ZoomErrorKind.REVERSED),
        ([-5, 10], 1, ZoomErrorKind.NEGATIVE),
        ([90, 200], 1, ZoomErrorKind.OUT_OF_RANGE),
        ([10, 90], 8, ZoomErrorKind.TOO_MANY_FRAMES),
        ([10, 10.5], 1, ZoomErrorKind.TOO_FEW_FRAMES),
    ],
)
def test_rejection_contains_the_request(segment, fps, kind):
    rejected = parse(call(f'{{"segment": {segment}, "fps": {fps}}}')).zoom
    assert isinstance(rejected, RejectedZoom)
    assert (rejected.kind, rejected.requested) == (kind, ZoomRequest(*map(float, segment), float(fps)))


def test_call_with_answer_is_rejected_with_request():
    rejected = parse(call('{"segment": [1, 2], "fps": 4}') + "<answer>A</answer>").zoom
    assert (rejected.kind, rejected.requested) == (ZoomErrorKind.CALL_WITH_ANSWER, ZoomRequest(1.0, 2.0, 4.0))


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
def test_rejection_of_unparsable_call_has_no_request(text):
    assert parse(text).zoom.requested is None


def test_rejection_with_fixed_fps_contains_the_call():
    text = call('{"segment": [90, 200], "fps": 4}')
    parsed = parse_turn(text, duration_s=100, max_frames=16, fixed_fps=2)
    assert parsed.zoom.requested == ZoomRequest(90.0, 200.0, 4.0)  # an invalid segment keeps the requested rate


CALL = '<video_zoom>{"segment": [1, 2], "fps": 1}</video_zoom>'


@pytest.mark.parametrize(
    "reasoning",
    [
        f"{CALL} would show it",
        f"{CALL}{CALL}",
        "I may use <video_zoom> or <answer>",
        "not <answer>A</answer>",
        "<video_zoom>not json</video_zoom>",
    ],
)
def test_quotes_in_reasoning_are_ignored(reasoning):
    assert parse(f"<think>{reasoning}</think>{CALL}").zoom == ZoomRequest(1.0, 2.0, 1.0)
    answered = parse(f"<think>{reasoning}</think><answer>B</answer>")
    assert (answered.zoom, answered.answer) == (None, "B")
    neither = parse(f"<think>{reasoning}</think>")
    assert (neither.zoom, neither.answer) == (None, None)


def test_several_reasoning_blocks_are_ignored():
    parsed = parse(f"<think>{CALL}</think>so<think><answer>A</answer></think><answer>B</answer>")
    assert (parsed.zoom, parsed.answer) == (None, "B")


def test_call_in_unclosed_reasoning_counts_unless_it_must_close():
    text = f"<think>look {CALL}"
    assert parse(text).zoom == ZoomRequest(1.0, 2.0, 1.0)
    strict = parse_turn(text, duration_s=100.0, max_frames=16, must_close_reasoning=True)
    assert (strict.zoom, strict.answer) == (None, None)


@given(st.text(alphabet="<>/think answervdo_zm{}", max_size=80))
def test_removing_reasoning_is_idempotent(text):
    assert "<think>" not in remove_reasoning(text, must_close=True)
    assert remove_reasoning(remove_reasoning(text, must_close=True), must_close=True) == remove_reasoning(
        text, must_close=True
    )
