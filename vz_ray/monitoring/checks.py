"""What was looked at, what was found, and what to do about it.

`require_checks` turns a problem into a one-line error, for commands that want to know before they start.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from rich.table import Table
from rich.text import Text

from vz_ray.utils.errors import UserError


class CheckStatus(StrEnum):
    OK = "ok"
    WARNING = "note"
    """Worth knowing; nothing fails because of it."""
    FAILED = "problem"


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The outcome of one check: what was found and, for a problem, what to do."""

    name: str
    status: CheckStatus
    detail: str
    fix: str = ""


def require_checks(*checks: CheckResult) -> None:
    """Raises `UserError` for the first of these that is a problem."""
    for check in checks:
        if check.status is CheckStatus.FAILED:
            raise UserError(f"{check.name}: {check.detail}; {check.fix}")


def failed_checks(checks: Iterable[CheckResult]) -> list[CheckResult]:
    return [check for check in checks if check.status is CheckStatus.FAILED]


def check_table(checks: Iterable[CheckResult]) -> Table:
    """For the terminal; what to do stands under what was found."""
    drawn = Table(box=None, pad_edge=False)
    for heading in ("", "check", "found"):
        drawn.add_column(heading, overflow="fold")
    colours = {CheckStatus.OK: "green", CheckStatus.WARNING: "yellow", CheckStatus.FAILED: "bold red"}
    for check in checks:
        found = Text(check.detail)
        if check.fix:
            found.append(f"\n-> {check.fix}", style="bold")
        drawn.add_row(Text(check.status, style=colours[check.status]), check.name, found)
    return drawn
