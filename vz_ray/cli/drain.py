"""`vz-ray drain`: drain this node."""

from __future__ import annotations

from typing import Annotated

import typer

from vz_ray.cli.app import app


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
