"""Numeric and symbolic scorers."""

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
def test_single_number_is_parsed_exactly(answer: str, value: Fraction | int) -> None:
    assert parse_number(answer) == value


@pytest.mark.parametrize(
    "answer",
    ["", "many", "2 or 3", "two or 3", "10-20", "3 in 10 s", "00:15", "1.2.3", "1,2", "3x", "x3", "one third",
     "two hundred", "3 million", "1/0", "9" * 500, "none",
     "x^2", "x - 2", r"\sqrt{2}", "2 + 3", "2pi"],
)  # fmt: skip
def test_other_text_is_not_a_number(answer: str) -> None:
    assert parse_number(answer) is None
    assert numbers_equal(answer, "7") is None


@settings(deadline=None)
@given(st.integers(-(10**9), 10**9))
def test_integers_must_be_equal(value: int) -> None:
    assert numbers_equal(f"{value}", f"{value}", rel_tol=0.5) is True
    assert numbers_equal(f"{value:,}", f"{value}") is True
    assert numbers_equal(f"{value + 1}", f"{value}", rel_tol=0.5) is False


def test_tolerance_applies_to_non_integers() -> None:
    assert numbers_equal("3.14", "3.1416", rel_tol=0.01) is True
    assert numbers_equal("3.2", "3.1416", rel_tol=0.01) is False
    assert numbers_equal("1e400", "3.5", rel_tol=0.01) is False


def test_non_numeric_truth_raises() -> None:
    with pytest.raises(ValueError, match="x\\^2"):
        numbers_equal("3", "x^2")


@settings(deadline=None)
@given(st.text(max_size=80))
def test_parser_never_raises(text: str) -> None:
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
def test_formulas_compare_symbolically(answer: str, truth: str, verdict: bool) -> None:
    assert math_equal(answer, truth, timeout_s=120) is verdict


def test_unparsable_truth_raises() -> None:
    with pytest.raises(UnparsableTruthError, match=r"\$\$"):
        math_equal("x", "$$", timeout_s=120)
    assert math_equal("$$", "$$") is True


@pytest.mark.parametrize(
    ("text", "formula"),
    [("2x", "$2x$"), ("**$2x$**", "$2x$"), ("tan(x)", r"$\tan(x)$"), (r"\tan x", r"$\tan x$"),
     ("two x", "two x"), ("", ""), ("x or $y$", "x or $y$")],
)  # fmt: skip
def test_only_bare_formula_is_marked_as_latex(text: str, formula: str) -> None:
    assert to_latex(text) == formula


@pytest.mark.parametrize(
    ("text", "formula"),
    [("x = 3", True), (r"\sqrt{9}", True), ("2 + 1", True), ("Answer: 3^2", True), ("3", False),
     ("12s", False), ("10-20", False), ("3 or 2 + 1", False), ("a + b = many", False),
     ("x" * 2000 + "^2", False)],
)  # fmt: skip
def test_formula_is_distinguished_from_prose(text: str, formula: bool) -> None:
    assert looks_like_formula(text) is formula


def test_crashed_process_is_replaced() -> None:
    process = MathVerifyProcess()
    try:
        assert process.compare("$2x$", "$x+x$", timeout_s=120) is True
        assert process._process is not None
        process._process.kill()  # may happen between poll and write
        assert process.compare("$2x$", "$x+x$", timeout_s=120) in (True, None)
        assert process.compare("$2x$", "$x+x$", timeout_s=120) is True
    finally:
        process.close()


def test_failed_math_verify_import_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('antlr is missing')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    process = MathVerifyProcess()
    with pytest.raises(UserError, match="ImportError: antlr is missing"):
        process.compare("x", "y", timeout_s=20)
    assert process._process is None


def test_hanging_formula_does_not_block_next_one() -> None:
    process = MathVerifyProcess()
    try:
        assert process.compare("$x$", "$x$", timeout_s=0.0) is None
        assert process.compare("$2x$", "$x+x$", timeout_s=120) is True
    finally:
        process.close()
