"""`vz-ray preflight`: check a run on this cluster."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from vz_ray.cli.app import app


@app.command(rich_help_panel="On a cluster")
def preflight(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[train|sft|eval|quickstart|ablate] [CONFIG.yaml] [KEY=VALUE]...",
            help="Command to check; default `train`.",
        ),
    ],
) -> None:
    """Check in seconds if this cluster has the resources, versions, volumes and keys for a run.

    Every run on a cluster starts with these checks. From another machine: `vz-ray submit --check`.

    Example: vz-ray preflight conf/videozoomer-7b-rl.yaml model=/models/cold-start runs=/runs
    """
    from rich.console import Console

    from vz_ray.jobs.submit import JobCommand
    from vz_ray.monitoring.checks import check_table, failed_checks
    from vz_ray.runtime.ray_cluster import check_cluster

    checks = asyncio.run(check_cluster(JobCommand.parse(arguments).config))
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    console.print(check_table(checks))
    raise typer.Exit(1 if failed_checks(checks) else 0)
