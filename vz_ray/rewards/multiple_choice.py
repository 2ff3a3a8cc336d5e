"""Scorers for multiple-choice answers.

`clean` parses the notations that models use for an option, inside the answer span only. An ambiguous answer
names no option. `compat` reproduces the released VideoZoomer code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from vz_ray.rewards.answer_text import last_answer, last_boxed, normalize_text, strip_wrapping

LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")

_LINE = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]*(.+?)[ \t]*$", re.MULTILINE)
_INLINE = re.compile(r"(?:^|(?<=\s))\(?([A-Z])[.):]\s+")
_LABEL = re.compile(r"^[(\[]?\s*([A-Za-z])\s*(?:[)\]]\s*[.:]?|[.:,;](?!\d)|\s[-\u2013\u2014]\s|$)\s*(.*)$", re.DOTALL)
_OTHER_LABEL = re.compile(r"\(([A-Z])\)|\b([A-Z])(?=\s*(?:[.):/,]|$))|\b(?i:or|and|not|nor)\s+\(?([A-Z])\b")
_LETTER_WITH_PERIOD = re.compile(r"([A-Z])\.")


def _last_option_run(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return the last run `A, B, C, ...` in `pairs` with at least two options, or an empty dict."""
    best: dict[str, str] = {}
    run: dict[str, str] = {}
    for letter, text in pairs:
        if letter == "A":
            run = {"A": text}
        elif run and ord(letter) == ord("A") + len(run):
            run[letter] = text
        if len(run) >= 2:
            best = dict(run)
    return best


def parse_options(question: str) -> dict[str, str]:
    """Parse the options of a question, one per line or inline; empty if the question lists no options.

    Example:
        >>> parse_options("What flashes? A. disc B. cross")
        {'A': 'disc', 'B': 'cross'}
    """
    lines = _last_option_run(_LINE.findall(question))
    marks = list(_INLINE.finditer(question))
    ends = [*(mark.start() for mark in marks[1:]), len(question)][: len(marks)]
    inline = _last_option_run(
        [(mark[1], question[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True)]
    )
    return inline if len(inline) > len(lines) else lines


def _by_text(text: str, options: Mapping[str, str]) -> str | None:
    """Return the letter of the only option with this text."""
    wanted = normalize_text(text)
    letters = [letter for letter, option in options.items() if wanted and normalize_text(option) == wanted]
    return letters[0] if len(letters) == 1 else None


def _by_label(text: str, options: Mapping[str, str]) -> str | None:
    """Return the option with the label at the start of `text`, unless the text also names another option."""
    match = _LABEL.match(text)
    if match is None:
        head, _, tail = text.partition(" ")
        letter = head.upper()
        is_labelled = letter in options and normalize_text(options[letter]) == normalize_text(tail)
        return letter if is_labelled else None
    letter, tail = match[1].upper(), match[2]
    if options and letter not in options:
        return None
    named_by_text = _by_text(tail, options)
    if named_by_text is not None or not tail:
        return letter if named_by_text in (None, letter) else None
    others = {a or b or c for a, b, c in _OTHER_LABEL.findall(tail)}
    return None if match[1].islower() or others - {letter} else letter


def parse_choice(answer: str, options: Mapping[str, str] | None = None) -> str | None:
    r"""Return the letter that an answer span names; None unless it names exactly one option.

    Accepts `B`, `b`, `B.`, `(B)`, `B)`, `B: text`, `Answer: B`, `The answer is (B).`,
    `**B**`, `\boxed{B}`, `$\text{B}$`, and an option's full text.

    Args:
        answer: Content of the answer span.
        options: Options by letter; empty or None if unknown.
    """
    options = options or {}
    text = strip_wrapping(answer)
    return _by_text(answer, options) or _by_text(text, options) or _by_label(text, options)


def choice_correct(answer: str, truth: str, options: Mapping[str, str] | None = None) -> bool | None:
    """Return whether `answer` and `truth` name the same option; None if `answer` names no option.

    If the truth is neither a letter nor an option's text (options without letters), the texts are compared.
    """
    options = options or {}
    if truth.strip() in LETTERS and truth.strip() not in options:
        options = {}  # The parsed list does not belong to this question.
    expected = parse_choice(truth, options)
    if expected is None:
        return normalize_text(strip_wrapping(answer)) == normalize_text(strip_wrapping(truth))
    named = parse_choice(answer, options)
    return None if named is None else named == expected


def choice_correct_compat(transcript: str, truth: str) -> bool:
    r"""Score like the released code: text, `\boxed{}` content, or the last capital letter before a period.

    Searches the last answer span, or the whole transcript if it has no span. Rejects `(B)`, `B)`, `Answer: B`
    and `b`, like the original.
    """
    span = last_answer(transcript)
    text = transcript if span is None else span
    letters = _LETTER_WITH_PERIOD.findall(text)
    return text.removesuffix(".") == truth or last_boxed(text) == truth or (bool(letters) and letters[-1] == truth)
