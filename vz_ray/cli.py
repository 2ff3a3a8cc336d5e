"""`vz-ray <command>`: reads arguments, calls one function, prints one-line errors.

Commands import what they need when they run, so that `vz-ray --help` is quick.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vz_ray import __version__
from vz_ray.observe.errors import UserError
from vz_ray.observe.interrupt import StopRequested

app = typer.Typer(
    help="Trains, evaluates and serves a zooming long-video agent.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The console script: 2 for an error that the user can mend, 130 after a requested stop."""
    try:
        app(prog_name="vz-ray")
    except UserError as error:
        if os.environ.get("VZ_RAY_DEBUG"):
            raise
        print(f"vz-ray: {error}", file=sys.stderr)
        sys.exit(2)
    except StopRequested as error:
        print(f"vz-ray: {error}; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


@app.callback(invoke_without_command=True)
def common(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def doctor(
    runs: Annotated[Path, typer.Option(help="Where runs are written.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list instead of a table.")] = False,
) -> None:
    """Checks this machine and environment, and says what to do about each problem."""
    from vz_ray.doctor import examine, problems, table

    checks = examine(runs)
    if as_json:
        import json

        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        from rich.console import Console

        Console().print(table(checks))
    raise typer.Exit(1 if problems(checks) else 0)


if __name__ == "__main__":
    main()
