"""`vz-ray top`: live status of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vz_ray.cli.app import app


@app.command(rich_help_panel="Inspecting runs")
def top(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    once: Annotated[bool, typer.Option("--once", help="Print one screen and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the status as a JSON object.")] = False,
) -> None:
    """Show the live status of a training run: progress, curves, workers, decoders, warnings.

    Example: vz-ray top runs/agent
    """
    from vz_ray.monitoring.run_view import read_run_view

    run_view = read_run_view(run)
    if as_json:
        import json

        print(json.dumps(run_view.to_dict()))
        return
    from rich.console import Console

    from vz_ray.monitoring.top import show_top

    console = Console(highlight=False)
    try:
        show_top(run_view, console.is_terminal and not once, console)
    except KeyboardInterrupt:
        return
