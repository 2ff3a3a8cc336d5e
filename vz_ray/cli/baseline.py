"""`vz-ray baseline`: train the uniform baseline of a quickstart run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vz_ray.cli.app import app


@app.command(rich_help_panel="Training")
def baseline(run: Annotated[Path, typer.Argument(help="A finished quickstart run.")]) -> None:
    """Train the uniform baseline on as many samples as the run's agent, and evaluate it.

    Example: vz-ray baseline runs/quickstart
    """
    from vz_ray.needle.quickstart import run_baseline

    run_baseline(run)
