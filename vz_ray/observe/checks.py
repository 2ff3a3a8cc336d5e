"""What was looked at, what was found, and what to do about it.

`require` turns a problem into a one-line error, for commands that want to know before they start.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from rich.table import Table
from rich.text import Text

from vz_ray.observe.errors import UserError


class Verdict(StrEnum):
    OK = "ok"
    NOTE = "note"
    """Worth knowing; nothing fails because of it."""
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of one check: what was found and, for a problem, what to do."""

    name: str
    verdict: Verdict
    found: str
    fix: str = ""


def require(*checks: Check) -> None:
    """Raises `UserError` for the first of these that is a problem."""
    for check in checks:
        if check.verdict is Verdict.PROBLEM:
            raise UserError(f"{check.name}: {check.found}; {check.fix}")


def problems(checks: Iterable[Check]) -> list[Check]:
    return [check for check in checks if check.verdict is Verdict.PROBLEM]


def table(checks: Iterable[Check]) -> Table:
    """For the terminal; what to do stands under what was found."""
    drawn = Table(box=None, pad_edge=False)
    for heading in ("", "check", "found"):
        drawn.add_column(heading, overflow="fold")
    colours = {Verdict.OK: "green", Verdict.NOTE: "yellow", Verdict.PROBLEM: "bold red"}
    for check in checks:
        found = Text(check.found)
        if check.fix:
            found.append(f"\n-> {check.fix}", style="bold")
        drawn.add_row(Text(check.verdict, style=colours[check.verdict]), check.name, found)
    return drawn
