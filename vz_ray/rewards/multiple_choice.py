"""Multiple choice.

`clean` reads the ways in which models name an option, inside the answer span
only, and never guesses: what could mean two options means none. `compat`
scores as the released VideoZoomer code does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from vz_ray.rewards.answer_text import last_answer, last_boxed, normalize_text, strip_wrapping

LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")

_LINE = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]*(.+?)[ \t]*$", re.MULTILINE)
_INLINE = re.compile(r"(?:^|(?<=\s))\(?([A-Z])[.):]\s+")
_LABEL = re.compile(
    r"^[(\[]?\s*([A-Za-z])\s*(?:[)\]]\s*[.:]?|[.:,;](?!\d)|\s[-\u2013\u2014]\s|$)\s*(.*)$", re.DOTALL
)
_OTHER = re.compile(r"\(([A-Z])\)|\b([A-Z])(?=\s*(?:[.):/,]|$))|\b(?i:or|and|not|nor)\s+\(?([A-Z])\b")
_POINTED = re.compile(r"([A-Z])\.")


def _in_sequence(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The last run `A, B, C, ...` among `pairs`, if it has at least two options."""
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
    """Options by letter, as written in the question, one per line or in one line.

    Example: `What flashes? A. disc B. cross` gives `{"A": "disc", "B": "cross"}`.
    Empty if the question names none.
    """
    lines = _in_sequence(_LINE.findall(question))
    marks = list(_INLINE.finditer(question))
    ends = [*(mark.start() for mark in marks[1:]), len(question)][: len(marks)]
    inline = _in_sequence(
        [(mark[1], question[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True)]
    )
    return inline if len(inline) > len(lines) else lines


def _by_text(text: str, options: Mapping[str, str]) -> str | None:
    """The only option with this text."""
    wanted = normalize_text(text)
    found = [letter for letter, option in options.items() if wanted and normalize_text(option) == wanted]
    return found[0] if len(found) == 1 else None


def _by_label(text: str, options: Mapping[str, str]) -> str | None:
    """The option that `text` starts with the label of, unless the rest speaks of another one."""
    match = _LABEL.match(text)
    if match is None:
        head, _, rest = text.partition(" ")
        letter = head.upper()
        return (
            letter if letter in options and normalize_text(options[letter]) == normalize_text(rest) else None
        )
    letter, rest = match[1].upper(), match[2]
    if options and letter not in options:
        return None
    meant = _by_text(rest, options)
    if meant is not None or not rest:
        return letter if meant in (None, letter) else None
    others = {a or b or c for a, b, c in _OTHER.findall(rest)}
    return None if match[1].islower() or others - {letter} else letter


def parse_choice(answer: str, options: Mapping[str, str] | None = None) -> str | None:
    r"""The letter that an answer span names, or None if it names none or more than one.

    Reads `B`, `b`, `B.`, `(B)`, `B)`, `B: text`, `Answer: B`, `The answer is (B).`,
    `**B**`, `\boxed{B}`, `$\text{B}$`, and an option's full text.

    Args:
        answer: Content of the answer span.
        options: Options by letter; empty or None where they are not known.
    """
    options = options or {}
    text = strip_wrapping(answer)
    return _by_text(answer, options) or _by_text(text, options) or _by_label(text, options)


def choice_correct(answer: str, truth: str, options: Mapping[str, str] | None = None) -> bool | None:
    """Whether `answer` names the option that `truth` names; None if it names no option.

    Where the truth is neither a letter nor an option's text (a question whose
    options are words without letters), the texts themselves are compared.
    """
    options = options or {}
    if truth.strip() in LETTERS and truth.strip() not in options:
        options = {}  # What looked like a list of options in the question is not this question's.
    expected = parse_choice(truth, options)
    if expected is None:
        return normalize_text(strip_wrapping(answer)) == normalize_text(strip_wrapping(truth))
    named = parse_choice(answer, options)
    return None if named is None else named == expected


def choice_correct_compat(transcript: str, truth: str) -> bool:
    r"""As the released scorer: exact text, `\boxed{}` content, or the last capital letter before a point.

    Looks into the last answer span, and into the whole transcript if there is
    none. It fails `(B)`, `B)`, `Answer: B` and `b`; that is its documented behaviour.
    """
    span = last_answer(transcript)
    text = transcript if span is None else span
    pointed = _POINTED.findall(text)
    return (
        text.removesuffix(".") == truth
        or last_boxed(text) == truth
        or (bool(pointed) and pointed[-1] == truth)
    )
