"""`vz-ray quickstart`: every stage on a laptop."""

from __future__ import annotations

from typing import Annotated

import typer

from vz_ray.cli.app import ConfigArguments, DryRun, app, resolve_config


@app.command(rich_help_panel="Training")
def quickstart(
    arguments: ConfigArguments = None,
    name: Annotated[str, typer.Option(help="Name of the run directory.")] = "quickstart",
    dry_run: DryRun = False,
) -> None:
    """Run every stage on a laptop: videos, cold start, RL training, baselines, report.

    Ctrl-C stops it; the same command resumes it.

    Example: vz-ray quickstart --name seed1 seed=1
    """
    from vz_ray.config.quickstart import QuickstartConfig
    from vz_ray.needle.quickstart import run_quickstart

    arguments = [*(arguments or []), f"name={name}"]
    run_quickstart(resolve_config(QuickstartConfig, arguments, "conf/quickstart.yaml", dry_run))
