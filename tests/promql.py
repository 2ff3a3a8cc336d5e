"""As much of PromQL as a test needs: tokens, balanced brackets, and which metrics a query reads."""

from __future__ import annotations

import re

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<string>"[^"]*"|'[^']*')
    | (?P<range>\[[^\]]*\])
    | (?P<number>\d+(?:\.\d+)?)
    | (?P<name>[a-zA-Z_:][\w:]*)
    | (?P<sign>==|!=|=~|!~|<=|>=|[-+*/%^<>=(){},])
    )""",
    re.VERBOSE,
)
_RANGE = re.compile(r"\[(\d+(ms|s|m|h|d|w))+\]|\[\$__rate_interval\]")
_WORDS = {
    "by",
    "without",
    "on",
    "ignoring",
    "group_left",
    "group_right",
    "and",
    "or",
    "unless",
    "bool",
    "offset",
}
_LISTS = {"by", "without", "on", "ignoring", "group_left", "group_right"}
FUNCTIONS = {
    "sum", "max", "min", "rate", "increase", "time", "histogram_quantile", "clamp_min", "max_over_time",
    "last_over_time",
}  # fmt: skip
_CLOSES = {")": "(", "}": "{"}


def tokenize(query: str) -> list[tuple[str, str]]:
    """Kind and text of each; `ValueError` that shows what is none."""
    found, at, text = [], 0, query.strip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"not PromQL from here: {text[at:]!r}")
        kind = match.lastgroup
        assert kind
        found.append((kind, match[kind]))
        at = match.end()
    return found


def metric_names_in(query: str) -> set[str]:
    """Names of the metrics that a query reads.

    Raises:
        ValueError: Brackets do not match, or a range or function is none.
    """
    found, opened, given = set(), [], tokenize(query)
    for at, (kind, text) in enumerate(given):
        following = given[at + 1][1] if at + 1 < len(given) else ""
        before = given[at - 1][1] if at else ""
        if kind == "sign" and text in "({":
            opened.append("list" if before in _LISTS else text)
        elif kind == "sign" and text in ")}":
            if not opened or opened.pop() not in (_CLOSES[text], "list"):
                raise ValueError(f"{text} closes nothing in {query!r}")
        elif kind == "range" and not _RANGE.fullmatch(text):
            raise ValueError(f"{text} is no range in {query!r}")
        elif kind == "name" and (not opened or opened[-1] == "(") and text not in _WORDS:
            if following in ("(", "by", "without"):
                if text not in FUNCTIONS:
                    raise ValueError(f"{text} is no function in {query!r}")
            else:
                found.add(text)
    if opened:
        raise ValueError(f"{opened[-1]} is never closed in {query!r}")
    return found
