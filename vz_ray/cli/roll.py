"""`vz-ray roll`: change the weights of a running server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vz_ray.cli.app import app
from vz_ray.utils.errors import UserError


@app.command(rich_help_panel="Serving")
def roll(
    model: Annotated[
        Path | None, typer.Argument(help="Checkpoint directory of the new weights.", show_default=False)
    ] = None,
    back: Annotated[bool, typer.Option("--back", help="Restore the previous weights.")] = False,
    log_dir: Annotated[Path, typer.Option(help="`log_dir` of the running server.")] = Path("runs/serve"),
) -> None:
    """Change the weights of a running server without dropping a request, or restore the previous weights.

    Example: vz-ray roll runs/quickstart/models/rl

    Example: vz-ray roll --back
    """
    from vz_ray.serve.launch import run_roll

    if (model is None) != back:
        raise UserError("got none or both of MODEL and --back; give one of them")
    run_roll(model, log_dir)
