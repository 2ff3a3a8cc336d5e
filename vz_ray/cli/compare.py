"""`vz-ray compare`: scores of several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vz_ray.cli.app import app


@app.command(rich_help_panel="Inspecting runs")
def compare(runs: Annotated[list[Path], typer.Argument(help="Run directories.")]) -> None:
    """Print the scores of several runs in one table, with medians.

    Example: vz-ray compare runs/seed0 runs/seed1 runs/seed2
    """
    from rich.console import Console

    from vz_ray.eval.run_summary import write_summary
    from vz_ray.eval.summary_tables import SUMMARY_WIDTH, runs_table
    from vz_ray.monitoring.run_dir import RunDir

    summaries = {path.name: write_summary(RunDir.open(path).path) for path in runs}
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, SUMMARY_WIDTH)
    console.print(runs_table(summaries))
