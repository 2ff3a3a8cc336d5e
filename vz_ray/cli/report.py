"""`vz-ray report`: HTML report of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vz_ray.cli.app import app


@app.command(rich_help_panel="Inspecting runs")
def report(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write report.html and summary.json from the outputs of a run.

    Example: vz-ray report runs/quickstart
    """
    import yaml

    from vz_ray.eval.run_summary import write_summary
    from vz_ray.eval.summary_tables import print_summary
    from vz_ray.monitoring.run_dir import RunDir
    from vz_ray.report import write_report

    run_dir = RunDir.open(run)
    print_summary(write_summary(run_dir.path))
    clips = (yaml.safe_load(run_dir.config.read_text()) or {}).get("clips", {})
    print(write_report(run_dir.path, decoder=clips.get("decoder", "pyav")))
