"""Scorer for numeric answers."""

from __future__ import annotations

import re
from fractions import Fraction

from vz_ray.rewards.answer_text import normalize_text, strip_wrapping

# fmt: off
_UNITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]
# fmt: on
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORDS = {word: value for value, word in enumerate(_UNITS)} | {
    word: 10 * value for value, word in enumerate(_TENS, start=2)
}
_WORDS |= {"once": 1, "twice": 2, "thrice": 3}
_COMPOUND = re.compile(rf"\b({'|'.join(_TENS)})[- ]({'|'.join(_UNITS[1:10])})\b")
_WORD = re.compile(rf"\b({'|'.join(_WORDS)})\b")
_DIGITS = re.compile(
    r"(?<![\w.,/])[-+\u2212]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d{1,3})?"
    r"(?:\s*/\s*\d+)?(?![\w/]|[.,]\d)"
)
_FRACTION = re.compile(r"\\d?frac\s*\{(-?\d+)\}\s*\{(-?\d+)\}")
_SCALED = re.compile(r"\b(?:half|halves|thirds?|quarters?|dozens?|hundreds?|thousands?|millions?|billions?)\b")
_FORMULA = re.compile(r"[\^*=_{}|<>√π]|[a-z)]\s*[-+]\s*\d|\d\s*\+|\b(?:sqrt|pi|log|ln|sin|cos|tan)\b")
_MAX_CHARS = 400
"""Longer answers are prose. The limit also keeps megabytes of digits away from `Fraction`."""


def _to_fraction(digits: str) -> Fraction | None:
    try:
        return Fraction(digits.replace(",", "").replace("\u2212", "-").replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        return None


def parse_number(answer: str) -> Fraction | None:
    r"""Parse the number in an answer span exactly; None unless the span contains exactly one number.

    Accepts `3`, `3.`, `3 times`, `three`, `twenty-one`, `Answer: 3`, `1,234`,
    `-0.5`, `1/2`, `\boxed{\frac{1}{2}}`, `50%` (as 50).
    """
    if len(answer) > _MAX_CHARS:
        return None
    text = strip_wrapping(_FRACTION.sub(r"\1/\2", answer)).casefold().replace("%", " ").replace("\\", " ")
    text = _COMPOUND.sub(lambda match: str(_WORDS[match[1]] + _WORDS[match[2]]), text)
    text = _WORD.sub(lambda match: str(_WORDS[match[1]]), text)
    if _SCALED.search(text) or _FORMULA.search(text):
        return None
    numbers = _DIGITS.findall(text)
    if len(numbers) != 1 or re.search(r"\d", _DIGITS.sub("", text)):
        return None
    return _to_fraction(numbers[0])


def numbers_equal(answer: str, truth: str, rel_tol: float = 0.0) -> bool | None:
    """Return whether two spans contain the same number; None if the answer contains no number.

    Integers must be equal; `rel_tol` applies if the truth is not an integer.

    Raises:
        ValueError: The truth is not a number. Use `math_answer` for formulas.
    """
    expected = parse_number(truth)
    if expected is None:
        raise ValueError(f"ground truth {truth!r} is not a number")
    if normalize_text(answer) == normalize_text(truth):
        return True
    value = parse_number(answer)
    if value is None:
        return None
    if expected.denominator == 1:
        return value == expected
    return abs(value - expected) <= Fraction(rel_tol) * max(abs(value), abs(expected))
