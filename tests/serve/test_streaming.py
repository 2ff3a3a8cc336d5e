"""Reasoning and answer are told apart while a turn is still being said."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vz_ray.env.zoom_call import extract_answer
from vz_ray.serve.streaming import TagStreamParser

TURN = '<think>red border</think><video_zoom>{"segment": [1, 2], "fps": 2}</video_zoom>'
ANSWER = "<think>a < b, so</think><answer>B</answer><|im_end|>"


def heard(text: str, cuts: list[int]) -> tuple[str, str, TagStreamParser]:
    """Everything that was told of a turn that came in these pieces."""
    speech, told = TagStreamParser(), []
    for cut in sorted({min(cut, len(text)) for cut in cuts}):
        told += speech.feed(text[:cut])
    told += speech.feed(text, final=True)
    return (
        "".join(piece for piece, answer in told if not answer),
        "".join(piece for piece, answer in told if answer),
        speech,
    )


@given(st.lists(st.integers(0, 120), max_size=30))
def test_what_is_told_does_not_depend_on_how_it_came(cuts):
    assert heard(TURN, cuts)[:2] == ("red border", "")
    assert heard(ANSWER, cuts)[:2] == ("a < b, so", "B")


@given(st.text(alphabet="<>/abcthinkswervdo_z|", max_size=60), st.lists(st.integers(0, 60), max_size=12))
def test_any_text_is_told_whole_once_whatever_it_holds(text, cuts):
    whole, piecewise = heard(text, []), heard(text, cuts)
    assert whole[:2] == piecewise[:2]


def test_nothing_is_held_back_that_cannot_be_a_tag():
    speech = TagStreamParser()
    assert speech.feed("x < y") == [("x < y", False)]
    assert speech.feed("x < y <ans") == [(" ", False)]
    assert speech.feed("x < y <answer>4") == [("4", True)]
    assert speech.feed("x < y <answer>42</ans") == [("2", True)]
    assert speech.feed("x < y <answer>42</answer>") == []


@given(st.text(alphabet="ab ", max_size=8), st.text(alphabet="ab ", max_size=8))
def test_the_answer_is_the_one_that_counts(first, second):
    text = f"<answer>{first}</answer><answer>{second}</answer>"
    assert heard(text, [])[2].answer == extract_answer(text)
