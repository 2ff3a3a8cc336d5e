"""Commands for runs on a Ray cluster."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from vz_ray.cli.app import app
from vz_ray.utils.console import make_console
from vz_ray.utils.errors import UserError

Exclude = Annotated[
    list[str] | None, typer.Option(help="Files or directories to exclude: docs, '*.mp4'.", show_default=False)
]
EnvVars = Annotated[
    list[str] | None,
    typer.Option(help="NAME=VALUE for the job; visible in the dashboard, so pass no secrets.", show_default=False),
]


@app.command(rich_help_panel="On a cluster")
def submit(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[train|sft|eval|quickstart|ablate] [CONFIG.yaml] [KEY=VALUE]...",
            help="Command to run; default `train`.",
            show_default=False,
        ),
    ] = None,
    address: Annotated[str, typer.Option(help="Job API, http://HEAD:8265; default: RAY_API_SERVER_ADDRESS.")] = "",
    check: Annotated[bool, typer.Option("--check", help="Only check if the run fits on the cluster.")] = False,
    attach: Annotated[str, typer.Option(help="Follow a job, by run name or job id.")] = "",
    stop: Annotated[str, typer.Option(help="Stop a job after it has written a checkpoint.")] = "",
    jobs: Annotated[bool, typer.Option("--jobs", help="List the jobs of the cluster.")] = False,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Print the job's output.")] = True,
    working_dir: Annotated[Path, typer.Option(help="Directory to upload: files tracked by git.")] = Path("."),
    exclude: Exclude = None,
    limit_mib: Annotated[float, typer.Option(help="Maximum upload size in MiB.", min=0)] = 100.0,
    env: EnvVars = None,
    grace_s: Annotated[
        int,
        typer.Option(help="Seconds that a stopped job has to save its state; see `vz-ray plan`.", min=1),
    ] = 600,
    allow_version_mismatch: Annotated[
        bool, typer.Option("--allow-version-mismatch", help="Accept another Ray version on the cluster.")
    ] = False,
) -> None:
    """Run a command as a job on a Ray cluster; follow, list or stop jobs.

    Ctrl-C leaves the job running. A job that is submitted again under the same name= resumes from its newest
    checkpoint.

    Example: vz-ray submit conf/videozoomer-7b-rl.yaml name=long runs=/runs model=/models/cold-start
    data.train=/videos/train.json data.validation=/videos/validation.json --address http://127.0.0.1:8265

    Example: vz-ray submit conf/videozoomer-7b-rl.yaml runs=/runs --check

    Example: vz-ray submit --stop long
    """
    from vz_ray.jobs import submit
    from vz_ray.jobs.job_client import JobClient, resolve_address
    from vz_ray.jobs.job_lifecycle import find_job

    if sum((bool(arguments), bool(attach), bool(stop), jobs)) != 1:
        raise UserError("give exactly one of: a command to run, --attach NAME, --stop NAME, --jobs")
    variables = _parse_variables(env or [])
    options = submit.SubmitOptions(
        address, working_dir, exclude or [], limit_mib, variables, grace_s, allow_version_mismatch, follow
    )
    if jobs:
        submit.list_jobs(options)
    elif stop:
        raise typer.Exit(submit.run_stop(stop, options))
    elif attach:
        client = JobClient(resolve_address(address), allow_version_mismatch=True)
        raise typer.Exit(submit.run_attach(client, find_job(client, attach).id, make_console()))
    else:
        command = submit.JobCommand.parse(arguments or [])
        raise typer.Exit(submit.run_submit(command, options, check_only=check))


def _parse_variables(pairs: list[str]) -> dict[str, str]:
    """Parse NAME=VALUE pairs."""
    variables = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    if len(variables) < len(pairs):
        raise UserError(f"--env is {', '.join(pairs)}; each value must be NAME=VALUE")
    return variables


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
    from vz_ray.jobs.submit import JobCommand
    from vz_ray.monitoring.checks import check_table, failed_checks
    from vz_ray.runtime.ray_cluster import check_cluster

    checks = asyncio.run(check_cluster(JobCommand.parse(arguments).config))
    make_console(min_width=120).print(check_table(checks))
    raise typer.Exit(1 if failed_checks(checks) else 0)


@app.command(rich_help_panel="On a cluster")
def drain(
    seconds: Annotated[float, typer.Option(help="Seconds until the node terminates.", min=0)] = 110.0,
    reason: Annotated[str, typer.Option(help="Reason that Ray displays.")] = "the machine is being reclaimed",
    address: Annotated[str, typer.Option(help="Cluster address HEAD:6379; default: the cluster of this machine.")] = "",
    node: Annotated[str, typer.Option(help="Ray node id; default: the node of this machine.")] = "",
) -> None:
    """Drain a node that will terminate soon: Ray schedules no new work on it. For a pod's preStop hook.

    Example: vz-ray drain --seconds 110
    """
    from vz_ray.jobs.node_drain import drain as drain_node

    drain_node(seconds, reason, address, node)
