"""Extraction of the answer span, and removal of the text that models wrap around an answer."""

from __future__ import annotations

import re

_SPAN = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_PREFIX = re.compile(
    r"^(?:(?:so|thus|therefore)\b[\s,]*)?(?:(?:the|my)\s+)?(?:(?:final|correct|best|right)\s+)*"
    r"(?:answer|option|choice|it)\b(?:\s+(?:answer|option|choice)\b)?"
    r"\s*(?:(?:is|would be|'s)\b)?\s*[:=]?\s*(?:(?:the\s+)?(?:option|choice)\b\s*)?",
    re.IGNORECASE,
)


def last_answer(transcript: str) -> str | None:
    """Return the content of the last `<answer>` pair, stripped; None if the transcript has no pair."""
    end = transcript.rfind("</answer>")
    spans = _SPAN.findall(transcript[: end + len("</answer>")]) if end >= 0 else []
    return spans[-1].strip() if spans else None


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{}`, which may contain one level of braces."""
    contents = _BOXED.findall(text)
    return contents[-1].strip() if contents else None


def strip_wrapping(answer: str) -> str:
    r"""Remove LaTeX, emphasis and an introductory phrase.

    Example: `The answer is **\boxed{\text{B}}**.` gives `B.`
    """
    boxed = last_boxed(answer)
    text = boxed if boxed is not None else answer
    text = _TEXT.sub(r"\1", text).replace("$", "").strip().strip("*_`\"'").strip()
    return _PREFIX.sub("", text, count=1).strip().strip("*_`\"'").strip()


def normalize_text(text: str) -> str:
    """Normalize for comparison: lower case, single spaces, no punctuation at the ends."""
    return " ".join(text.casefold().split()).strip(" .,;:!")
