"""Results of environment checks: status, detail and fix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from rich.table import Table
from rich.text import Text

from vz_ray.utils.errors import UserError


class CheckStatus(StrEnum):
    OK = "ok"
    WARNING = "warning"
    """Worth knowing; the command still works."""
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class CheckResult:
    """Outcome of one check.

    Attributes:
        name: Name of the check.
        status: Outcome.
        detail: Observed state.
        fix: What to do about a warning or failure.
    """

    name: str
    status: CheckStatus
    detail: str
    fix: str = ""


def require_checks(*checks: CheckResult) -> None:
    """Raise `UserError` for the first failed check."""
    for check in checks:
        if check.status is CheckStatus.FAILED:
            raise UserError(f"{check.name}: {check.detail}; {check.fix}")


def failed_checks(checks: Iterable[CheckResult]) -> list[CheckResult]:
    """Return the failed checks."""
    return [check for check in checks if check.status is CheckStatus.FAILED]


def check_table(checks: Iterable[CheckResult]) -> Table:
    """Return a terminal table with one row per check; the fix is printed below the detail."""
    table = Table(box=None, pad_edge=False)
    for heading in ("", "check", "result"):
        table.add_column(heading, overflow="fold")
    styles = {CheckStatus.OK: "green", CheckStatus.WARNING: "yellow", CheckStatus.FAILED: "bold red"}
    for check in checks:
        detail = Text(check.detail)
        if check.fix:
            detail.append(f"\n-> {check.fix}", style="bold")
        table.add_row(Text(check.status, style=styles[check.status]), check.name, detail)
    return table
