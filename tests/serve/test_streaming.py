"""Incremental parsing of reasoning and answer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vz_ray.env.zoom_call import extract_answer
from vz_ray.serve.streaming import TagStreamParser

TURN = '<think>red border</think><video_zoom>{"segment": [1, 2], "fps": 2}</video_zoom>'
ANSWER = "<think>a < b, so</think><answer>B</answer><|im_end|>"


def parse(text: str, cuts: list[int]) -> tuple[str, str, TagStreamParser]:
    """Feed a turn in chunks; return reasoning text, answer text and the parser."""
    parser, pieces = TagStreamParser(), []
    for cut in sorted({min(cut, len(text)) for cut in cuts}):
        pieces += parser.feed(text[:cut])
    pieces += parser.feed(text, final=True)
    return (
        "".join(piece for piece, answer in pieces if not answer),
        "".join(piece for piece, answer in pieces if answer),
        parser,
    )


@given(st.lists(st.integers(0, 120), max_size=30))
def test_parser_is_independent_of_chunks(cuts):
    assert parse(TURN, cuts)[:2] == ("red border", "")
    assert parse(ANSWER, cuts)[:2] == ("a < b, so", "B")


@given(st.text(alphabet="<>/abcthinkswervdo_z|", max_size=60), st.lists(st.integers(0, 60), max_size=12))
def test_any_text_is_returned_exactly_once(text, cuts):
    whole, piecewise = parse(text, []), parse(text, cuts)
    assert whole[:2] == piecewise[:2]


def test_only_possible_tags_are_held_back():
    parser = TagStreamParser()
    assert parser.feed("x < y") == [("x < y", False)]
    assert parser.feed("x < y <ans") == [(" ", False)]
    assert parser.feed("x < y <answer>4") == [("4", True)]
    assert parser.feed("x < y <answer>42</ans") == [("2", True)]
    assert parser.feed("x < y <answer>42</answer>") == []


@given(st.text(alphabet="ab ", max_size=8), st.text(alphabet="ab ", max_size=8))
def test_answer_is_the_last_answer_span(first, second):
    text = f"<answer>{first}</answer><answer>{second}</answer>"
    assert parse(text, [])[2].answer == extract_answer(text)


@given(st.lists(st.integers(0, 120), max_size=30))
def test_tags_inside_reasoning_are_text(cuts):
    quoted = "use <answer>A</answer> or <video_zoom>x</video_zoom>"
    reasoning, answer, parser = parse(f"<think>{quoted}</think><answer>B</answer><|im_end|>", cuts)
    assert (reasoning, answer, parser.answer) == (quoted, "B", "B")


def test_opened_reasoning_needs_no_tag():
    parser = TagStreamParser(open_tag="<think>")
    assert parser.feed("not <answer>A") == [("not <answer>A", False)]
    assert parser.feed("not <answer>A</thi") == []
    assert parser.feed("not <answer>A</think>\n\n<answer>B") == [("\n\n", False), ("B", True)]
    assert parser.answer == "B"
