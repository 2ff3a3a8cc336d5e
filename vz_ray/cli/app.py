"""The application: what all commands share, and how errors end."""

from __future__ import annotations

import os
import sys
from typing import Annotated, TypeVar

import typer

from vz_ray import __version__
from vz_ray.utils.errors import UserError
from vz_ray.utils.interrupt import StopRequested

C = TypeVar("C")

app = typer.Typer(
    help="Trains, evaluates and serves a zooming long-video agent.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The console script: 2 for an error that the user can mend, 130 after a requested stop."""
    # Where a reward function of the user's own is looked for last; Ray's workers look there too.
    sys.path.append(os.getcwd())
    try:
        app(prog_name="vz-ray")
    except UserError as error:
        if os.environ.get("VZ_RAY_DEBUG"):
            raise
        print(f"vz-ray: {error}", file=sys.stderr)
        sys.exit(2)
    except StopRequested as error:
        print(f"vz-ray: {error}; {error.resume_hint}", file=sys.stderr)
        sys.exit(130)


@app.callback(invoke_without_command=True)
def root_callback(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


ConfigArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml] [KEY=VALUE]...", help="A config file and overrides.", show_default=False
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and stop.")]


def resolve_config(schema: type[C], arguments: list[str] | None, default: str | None, dry_run: bool) -> C:
    """The config that a command's arguments ask for; printed, and the command ended, on a dry run."""
    from vz_ray.config import load_config, to_yaml

    given = arguments or []
    files = [argument for argument in given if argument.endswith((".yaml", ".yml")) and "=" not in argument]
    if len(files) > 1:
        raise UserError(f"two config files were given, {files[0]} and {files[1]}: one may extend the other")
    overrides = [argument for argument in given if argument not in files]
    config = load_config(schema, files[0] if files else default, overrides)
    if dry_run:
        print(to_yaml(config), end="")
        raise typer.Exit
    return config
