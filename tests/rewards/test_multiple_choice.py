"""Multiple-choice scorers `clean` and `compat`."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vz_ray.rewards.answer_text import last_answer, last_boxed
from vz_ray.rewards.multiple_choice import choice_correct, choice_correct_compat, parse_choice, parse_options

OPTIONS = {"A": "disc", "B": "cross", "C": "red square", "D": "A ring"}
INLINE = "What flashes while the red border is shown? A. disc B. cross C. red square D. A ring"
LINES = "What flashes?\n(A) disc\n(B) cross\n(C) red square\n(D) A ring"


@pytest.mark.parametrize(
    "answer",
    [
        "B",
        "b",
        "B.",
        "(B)",
        "B)",
        "(b)",
        "[B]",
        "Answer: B",
        "answer: (B)",
        "The answer is B.",
        "The correct answer is (B).",
        "Option B",
        "Final answer: B",
        "It is B",
        r"\boxed{B}",
        r"$\boxed{\text{B}}$",
        r"The answer is \boxed{B}.",
        "**B**",
        " B \n",
        "cross",
        "Cross.",
        "B. cross",
        "B cross",
        "(B) cross",
        "B: a cross, seen at 12 s",
        "B, the cross",
        "B - cross",
    ],
)
def test_clean_parses_common_notations(answer: str) -> None:
    assert parse_choice(answer, OPTIONS) == "B"
    assert choice_correct(answer, "B", OPTIONS) is True
    assert choice_correct(answer, "C", OPTIONS) is False


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "A or B",
        "A, B",
        "A/B",
        "A. or B",
        "(A) and (B)",
        "B. disc",
        "not B",
        "The answer is not B",
        "none of them",
        "E",
        "A man walks",
        "e.g. something",
        "disc cross",
        "I do not know",
        "ABCD",
    ],
)
def test_clean_rejects_ambiguous_answers(answer: str) -> None:
    assert parse_choice(answer, OPTIONS) is None
    assert choice_correct(answer, "A", OPTIONS) is None


@pytest.mark.parametrize("truth", ["C", "(C)", "C.", "red square", "C. red square"])
def test_truth_may_be_letter_or_option_text(truth: str) -> None:
    assert choice_correct("C", truth, OPTIONS) is True
    assert choice_correct("Red square", truth, OPTIONS) is True
    assert choice_correct("A", truth, OPTIONS) is False


def test_options_without_letters_compare_as_text() -> None:
    assert choice_correct("The answer is yes.", "Yes") is True
    assert choice_correct("no", "Yes") is False


def test_leading_article_is_not_option_a() -> None:
    assert parse_choice("A ring", OPTIONS) == "D"
    assert parse_choice("D. A ring", OPTIONS) == "D"


def test_truth_outside_options_ignores_them() -> None:
    assert choice_correct("(F)", "F", OPTIONS) is True


@pytest.mark.parametrize("question", [INLINE, LINES, LINES.replace("(A) ", "A. "), "Vitamin B. helps?\n" + LINES])
def test_options_are_parsed_from_question(question: str) -> None:
    expected = OPTIONS if "(A)" in question or question == INLINE else None
    assert parse_options(question) == (expected or parse_options(question))
    assert parse_options(question)["B"] == "cross"


@pytest.mark.parametrize("question", ["How many times does it flash?", "", "A. only one", "B. b\nC. c"])
def test_question_without_options(question: str) -> None:
    assert parse_options(question) == {}


@settings(deadline=None)
@given(st.text(max_size=60))
def test_parser_returns_known_option_or_none(text: str) -> None:
    assert parse_choice(text, OPTIONS) in {*OPTIONS, None}


@settings(deadline=None)
@given(
    st.sampled_from("ABCDEFGHIJ"),
    st.sampled_from(["{}", "({})", "{})", "Answer: {}", "{}.", r"\boxed{{{}}}"]),
)
def test_letters_up_to_j_in_every_notation(letter: str, form: str) -> None:
    options = {c: f"option {c.lower()}{c.lower()}" for c in "ABCDEFGHIJ"}
    assert parse_choice(form.format(letter), options) == letter
    assert parse_choice(form.format(letter.lower()), options) == letter


COMPAT = [
    ("<answer>B</answer>", True),
    ("<answer> B </answer>", True),
    ("<answer>B.</answer>", True),
    (r"<answer>\boxed{B}</answer>", True),
    ("<answer>B. cross</answer>", True),
    ("<answer>A. no, B. yes</answer>", True),
    ("<answer>B. yes, not A.</answer>", False),
    ("<answer>A</answer><answer>B</answer>", True),
    ("<answer>B</answer><answer>A</answer>", False),
    ("I am sure it is B.", True),
    ("It is B. Is it A. maybe", False),
    ("<answer>(B)</answer>", False),
    ("<answer>B)</answer>", False),
    ("<answer>Answer: B</answer>", False),
    ("<answer>b</answer>", False),
    ("<answer>cross</answer>", False),
    ("<answer></answer>", False),
    ("", False),
]


@pytest.mark.parametrize(("transcript", "correct"), COMPAT)
def test_compat_scores_as_documented(transcript: str, correct: bool) -> None:
    assert choice_correct_compat(transcript, "B") is correct


def test_last_answer_and_box_are_used() -> None:
    assert last_answer("<answer>1</answer> x <answer> 2 </answer> <answer>") == "2"
    assert last_answer("<answer>1") is None
    assert last_boxed(r"\boxed{1} \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
