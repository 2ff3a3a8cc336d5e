"""Runs as jobs on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vz_ray.cli.app import app
from vz_ray.utils.errors import UserError

Address = Annotated[str, typer.Option(help="Of the job API, http://HEAD:8265; else RAY_API_SERVER_ADDRESS.")]


@app.command(rich_help_panel="On a cluster")
def submit(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[train|sft|eval|quickstart|ablate] [CONFIG.yaml] [KEY=VALUE]...",
            help="What is run; `train` if it is left out.",
            show_default=False,
        ),
    ] = None,
    address: Address = "",
    check: Annotated[
        bool, typer.Option("--check", help="Only look whether it would fit on the cluster, and say why not.")
    ] = False,
    attach: Annotated[str, typer.Option(help="Follow a job, by its run's name or its id.")] = "",
    stop: Annotated[str, typer.Option(help="Stop a job; its checkpoint is written first.")] = "",
    jobs: Annotated[bool, typer.Option("--jobs", help="List the cluster's jobs.")] = False,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Show what it prints.")] = True,
    working_dir: Annotated[Path, typer.Option(help="What is sent: the files that git knows.")] = Path("."),
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Files or directories that stay: docs, '*.mp4'.", show_default=False),
    ] = None,
    limit_mib: Annotated[float, typer.Option(help="Most that is sent, MiB.", min=0)] = 100.0,
    env: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE for the job; shown in the dashboard, so no secrets.", show_default=False
        ),
    ] = None,
    grace_s: Annotated[
        int, typer.Option(help="Seconds that it has for its checkpoint when it is stopped.", min=1)
    ] = 600,
    any_ray: Annotated[bool, typer.Option("--any-ray", help="Put up with another version of Ray.")] = False,
) -> None:
    """Runs a command as a job on a Ray cluster, follows it, finds it again, stops it.

    Ctrl-C leaves it running. Submitted again under the same name=, it goes on from its last checkpoint.

    Example: vz-ray submit conf/videozoomer-7b-rl.yaml name=long runs=/runs --address http://127.0.0.1:8265

    Example: vz-ray submit conf/videozoomer-7b-rl.yaml runs=/runs --check

    Example: vz-ray submit --stop long
    """
    from rich.console import Console

    from vz_ray.jobs import submit
    from vz_ray.jobs.job_client import JobClient, resolve_address
    from vz_ray.jobs.job_lifecycle import find_job

    if sum((bool(arguments), bool(attach), bool(stop), jobs)) != 1:
        raise UserError("give one of: a config to run, --attach NAME, --stop NAME, --jobs")
    variables = dict(pair.split("=", 1) for pair in env or [] if "=" in pair)
    if len(variables) < len(env or []):
        raise UserError(f"--env wants NAME=VALUE, and got {', '.join(env or [])}")
    how = submit.SubmitOptions(
        address, working_dir, tuple(exclude or ()), limit_mib, variables, grace_s, any_ray, follow
    )
    if jobs:
        submit.list_jobs(how)
    elif stop:
        submit.run_stop(stop, how)
    elif attach:
        client = JobClient(resolve_address(address), allow_version_mismatch=True)
        raise typer.Exit(submit.run_attach(client, find_job(client, attach).id, Console(highlight=False)))
    else:
        wanted = submit.JobCommand.parse(arguments or [])
        raise typer.Exit(submit.run_submit(wanted, how, check_only=check))


@app.command(rich_help_panel="On a cluster")
def preflight(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[train|sft|eval|quickstart|ablate] [CONFIG.yaml] [KEY=VALUE]...",
            help="What would be run; `train` if it is left out.",
        ),
    ],
) -> None:
    """Looks, on a cluster, whether a run would find room, versions, volumes and keys; in seconds.

    Every run that joins a cluster does this first. From elsewhere: `vz-ray submit --check`.

    Example: vz-ray preflight conf/videozoomer-7b-rl.yaml model=/models/cold-start runs=/runs
    """
    from vz_ray.jobs.submit import JobCommand
    from vz_ray.runtime.preflight_report import run_preflight

    raise typer.Exit(run_preflight(JobCommand.parse(arguments).config))


@app.command(rich_help_panel="On a cluster")
def drain(
    seconds: Annotated[float, typer.Option(help="Until this node is gone.", min=0)] = 110.0,
    reason: Annotated[str, typer.Option(help="Shown by Ray.")] = "the machine is being reclaimed",
    address: Annotated[str, typer.Option(help="Of the cluster, HEAD:6379; else that of this machine.")] = "",
    node: Annotated[str, typer.Option(help="Ray's id of the node; else the one on this machine.")] = "",
) -> None:
    """Tells Ray that this node will be gone soon, so that it gets no new work: for a pod's preStop hook.

    Example: vz-ray drain --seconds 110
    """
    from vz_ray.jobs.node_drain import drain as drain_node

    drain_node(seconds, reason, address, node)
