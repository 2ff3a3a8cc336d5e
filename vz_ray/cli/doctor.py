"""`vz-ray doctor`: check this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vz_ray.cli.app import app


@app.command(rich_help_panel="On this machine")
def doctor(
    runs: Annotated[Path, typer.Option(help="Parent of run directories.")] = Path("runs"),
    gpu: Annotated[bool, typer.Option("--gpu", help="Check NVIDIA GPUs, too: driver, kernels, NCCL.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
) -> None:
    """Check this machine and its environment, and print a fix for each problem.

    With --gpu, measured figures are written to gpu-check.json in the parent of run directories.
    """
    from vz_ray.jobs.doctor import run_checks
    from vz_ray.monitoring.checks import check_table, failed_checks

    checks = run_checks(runs)
    if gpu:
        from vz_ray.jobs.gpu_checks import run_gpu_checks

        checks += run_gpu_checks(runs / "gpu-check.json")
    if as_json:
        import json

        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        from rich.console import Console

        Console().print(check_table(checks))
    raise typer.Exit(1 if failed_checks(checks) else 0)
