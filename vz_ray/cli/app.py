"""The typer application: shared arguments, config resolution, exit codes."""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from vz_ray import __version__
from vz_ray.utils.errors import UserError
from vz_ray.utils.interrupt import StopRequested

if TYPE_CHECKING:
    pass

C = TypeVar("C")

_FREE_SPACE = "free some space, or use another directory"
_NO_ACCESS = "change its permissions, or use another directory"
FILE_ERROR_FIXES = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EROFS: "use another directory",
    errno.EACCES: _NO_ACCESS,
    errno.EPERM: _NO_ACCESS,
    errno.ENAMETOOLONG: "use a shorter path",
    errno.ENOTDIR: "use another path",
    errno.EISDIR: "use another path",
}
"""Errors of files that the user can fix; every other `OSError` keeps its traceback."""

app = typer.Typer(
    help="Train, evaluate and serve video agents that zoom.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line.

    Exit code 1: a file or directory cannot be used; 2: another error that the user can fix; 130: stopped on request.
    """
    # User reward functions may live in the working directory; Ray's workers search it too.
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
    except OSError as error:
        fix = FILE_ERROR_FIXES.get(error.errno or 0)
        if fix is None or error.filename is None or os.environ.get("VZ_RAY_DEBUG"):
            raise
        print(f"vz-ray: {os.fsdecode(error.filename)}: {error.strerror}; {fix}", file=sys.stderr)
        sys.exit(1)


@app.callback(invoke_without_command=True)
def root_callback(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


ConfigArguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG.yaml] [KEY=VALUE]...", help="A config file and overrides.", show_default=False),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and exit.")]


def resolve_config(schema: type[C], arguments: list[str] | None, default: str | None, dry_run: bool) -> C:
    """Return the config of a command; on a dry run, print it and exit.

    Args:
        default: Config file if `arguments` has none.
    """
    from vz_ray.config.load import load_config, split_arguments, to_yaml

    file, overrides = split_arguments(arguments or [])
    config = load_config(schema, file or default, overrides)
    if dry_run:
        print(to_yaml(config), end="")
        raise typer.Exit
    return config
