"""Minimal PromQL parser for tests: tokens, balanced brackets, metric names of a query."""

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
    """Split `query` into (kind, text) pairs; raise ValueError at the first invalid token."""
    parsed, position, text = [], 0, query.strip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(f"not PromQL from here: {text[position:]!r}")
        kind = match.lastgroup
        assert kind
        parsed.append((kind, match[kind]))
        position = match.end()
    return parsed


def metric_names_in(query: str) -> set[str]:
    """Return the names of the metrics in `query`.

    Raises:
        ValueError: A bracket does not match, or a range or function is invalid.
    """
    names, opened, query_tokens = set(), [], tokenize(query)
    for index, (kind, text) in enumerate(query_tokens):
        following = query_tokens[index + 1][1] if index + 1 < len(query_tokens) else ""
        before = query_tokens[index - 1][1] if index else ""
        if kind == "sign" and text in "({":
            opened.append("list" if before in _LISTS else text)
        elif kind == "sign" and text in ")}":
            if not opened or opened.pop() not in (_CLOSES[text], "list"):
                raise ValueError(f"{text} closes nothing in {query!r}")
        elif kind == "range" and not _RANGE.fullmatch(text):
            raise ValueError(f"{text} is not a range in {query!r}")
        elif kind == "name" and (not opened or opened[-1] == "(") and text not in _WORDS:
            if following in ("(", "by", "without"):
                if text not in FUNCTIONS:
                    raise ValueError(f"{text} is not a function in {query!r}")
            else:
                names.add(text)
    if opened:
        raise ValueError(f"{opened[-1]} is never closed in {query!r}")
    return names
