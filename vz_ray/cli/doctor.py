"""`vz-ray doctor`: check this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vz_ray.cli.app import app


@app.command(rich_help_panel="On this machine")
def doctor(
    runs: Annotated[Path, typer.Option(help="Parent of run directories.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
) -> None:
    """Check this machine and its environment, and print a fix for each problem."""
    from vz_ray.jobs.doctor import run_checks
    from vz_ray.monitoring.checks import check_table, failed_checks

    checks = run_checks(runs)
    if as_json:
        import json

        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        from rich.console import Console

        Console().print(check_table(checks))
    raise typer.Exit(1 if failed_checks(checks) else 0)
