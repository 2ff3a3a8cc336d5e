"""Numbers are read exactly or not at all."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vz_ray.rewards.math_answer import (
    MathVerifyProcess,
    UnparsableTruthError,
    looks_like_formula,
    math_equal,
    to_latex,
)
from vz_ray.rewards.numeric import numbers_equal, parse_number
from vz_ray.utils.errors import UserError


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("3", 3),
        ("3.", 3),
        ("3.0", 3),
        ("Answer: 3", 3),
        ("The answer is 3 times.", 3),
        ("three", 3),
        ("It flashes three times", 3),
        ("twice", 2),
        ("twenty-one", 21),
        ("ninety nine", 99),
        ("1,234", 1234),
        ("-4", -4),
        ("\u22124", -4),
        ("0.5", Fraction(1, 2)),
        ("1/2", Fraction(1, 2)),
        (r"\boxed{\frac{1}{2}}", Fraction(1, 2)),
        (r"\boxed{3}", 3),
        ("$3$", 3),
        ("**3**", 3),
        ("50%", 50),
        ("1e3", 1000),
    ],
)
def test_one_number_is_read_exactly(answer: str, value: Fraction | int) -> None:
    assert parse_number(answer) == value


@pytest.mark.parametrize(
    "answer",
    ["", "many", "2 or 3", "two or 3", "10-20", "3 in 10 s", "00:15", "1.2.3", "1,2", "3x", "x3", "one third",
     "two hundred", "3 million", "1/0", "9" * 500, "none",
     "x^2", "x - 2", r"\sqrt{2}", "2 + 3", "2pi"],
)  # fmt: skip
def test_anything_else_is_not_a_number(answer: str) -> None:
    assert parse_number(answer) is None
    assert numbers_equal(answer, "7") is None


@settings(deadline=None)
@given(st.integers(-(10**9), 10**9))
def test_integers_must_be_equal(value: int) -> None:
    assert numbers_equal(f"{value}", f"{value}", rel_tol=0.5) is True
    assert numbers_equal(f"{value:,}", f"{value}") is True
    assert numbers_equal(f"{value + 1}", f"{value}", rel_tol=0.5) is False


def test_tolerance_is_for_other_numbers() -> None:
    assert numbers_equal("3.14", "3.1416", rel_tol=0.01) is True
    assert numbers_equal("3.2", "3.1416", rel_tol=0.01) is False
    assert numbers_equal("1e400", "3.5", rel_tol=0.01) is False


def test_a_truth_that_is_no_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="x\\^2"):
        numbers_equal("3", "x^2")


@settings(deadline=None)
@given(st.text(max_size=80))
def test_any_text_is_a_number_or_none(text: str) -> None:
    assert isinstance(parse_number(text), Fraction | None)


@pytest.mark.parametrize(
    ("answer", "truth", "verdict"),
    [
        (r"$\frac{x}{2}$", "$x/2$", True),
        ("$(x+1)^2$", "$x^2+2x+1$", True),
        ("$x+1$", "$x+2$", False),
        (" X + 1.", "x + 1", True),
        ("The answer is 2x", "x + x", True),
        ("we get $x$, thus $2x$", "2x", True),
        ("2", "2x", False),
        ("2", r"2\pi", False),
        ("2", "(1, 2)", False),
        ("$(1,2)$", "(1, 2)", True),
        ("sin(x)", r"\sin(x)", True),
        (r"\[x+1\]", "x+1", True),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        ("3 cm", r"3 \text{ cm}", True),
        ("a dog", r"\frac{x}{2}", False),
        ("1" * 2000, "$x$", None),
    ],
)
def test_formulas_are_compared_symbolically(answer: str, truth: str, verdict: bool) -> None:
    assert math_equal(answer, truth, timeout_s=120) is verdict


def test_a_truth_that_is_no_expression_is_not_the_answers_fault() -> None:
    with pytest.raises(UnparsableTruthError, match=r"\$\$"):
        math_equal("x", "$$", timeout_s=120)
    assert math_equal("$$", "$$") is True


@pytest.mark.parametrize(
    ("text", "formula"),
    [("2x", "$2x$"), ("**$2x$**", "$2x$"), ("tan(x)", r"$\tan(x)$"), (r"\tan x", r"$\tan x$"),
     ("two x", "two x"), ("", ""), ("x or $y$", "x or $y$")],
)  # fmt: skip
def test_only_a_bare_formula_is_marked_as_one(text: str, formula: str) -> None:
    assert to_latex(text) == formula


@pytest.mark.parametrize(
    ("text", "formula"),
    [("x = 3", True), (r"\sqrt{9}", True), ("2 + 1", True), ("Answer: 3^2", True), ("3", False),
     ("12s", False), ("10-20", False), ("3 or 2 + 1", False), ("a + b = many", False),
     ("x" * 2000 + "^2", False)],
)  # fmt: skip
def test_a_formula_is_told_from_words(text: str, formula: bool) -> None:
    assert looks_like_formula(text) is formula


def test_a_child_that_dies_is_replaced() -> None:
    child = MathVerifyProcess()
    try:
        assert child.compare("$2x$", "$x+x$", timeout_s=120) is True
        assert child._process is not None
        child._process.kill()  # between poll and write, or before: both must be survived
        assert child.compare("$2x$", "$x+x$", timeout_s=120) in (True, None)
        assert child.compare("$2x$", "$x+x$", timeout_s=120) is True
    finally:
        child.close()


def test_math_verify_that_cannot_be_loaded_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('antlr is missing')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    child = MathVerifyProcess()
    with pytest.raises(UserError, match="ImportError: antlr is missing"):
        child.compare("x", "y", timeout_s=20)
    assert child._process is None


def test_a_hanging_formula_gives_no_verdict_and_the_next_one_is_scored() -> None:
    child = MathVerifyProcess()
    try:
        assert child.compare("$x$", "$x$", timeout_s=0.0) is None
        assert child.compare("$2x$", "$x+x$", timeout_s=120) is True
    finally:
        child.close()
