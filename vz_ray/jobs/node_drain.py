"""Drain a node before its termination, so that Ray schedules no new work on it.

Ray has no public API for this; the module calls its control service (GCS).
"""

from __future__ import annotations

import socket
import time
from typing import Any

import psutil
import ray
from ray._private.services import canonicalize_bootstrap_address
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from vz_ray.jobs.job_client import configure_token_auth
from vz_ray.utils.errors import UserError
from vz_ray.utils.ports import check_ray_connection


def drain(seconds: float, reason: str, address: str, node: str) -> None:
    """Mark a node as draining.

    Args:
        seconds: Time until the node terminates.
        reason: Message that Ray displays.
        address: Address of the cluster; empty uses the cluster of this machine.
        node: Ray's node id; empty uses the node on this machine.

    Raises:
        UserError: No cluster runs at `address`, this machine runs no Ray node, or Ray rejects the request.
    """
    configure_token_auth()
    gcs_address = address or canonicalize_bootstrap_address("auto")
    if not gcs_address:
        raise UserError("no Ray cluster is running on this machine; give --address HEAD:6379")
    check_ray_connection(gcs_address, "give the address of a running cluster with --address HEAD:6379")
    client = ray._raylet.GcsClient(address=gcs_address)
    node_id = node or _local_node_id(client, gcs_address)
    accepted, rejection = client.drain_node(
        node_id,
        DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        reason,
        int((time.time() + seconds) * 1000),
    )
    if not accepted:
        raise UserError(f"Ray refused to drain node {node_id[:12]}: {rejection}")
    print(f"draining node {node_id[:12]}: it gets no new work and terminates in {seconds:g} s")


def _local_node_id(client: Any, gcs_address: str) -> str:
    """Return the id of the Ray node whose address belongs to this machine."""
    local_addresses = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    local_addresses |= {socket.gethostname()}
    alive = [node for node in client.get_all_node_info(timeout=10).values() if node.state == 0]
    local_nodes = [node for node in alive if node.node_manager_address in local_addresses]
    if len(local_nodes) != 1:
        raise UserError(
            f"{len(local_nodes)} of the {len(alive)} nodes of the cluster at {gcs_address} run on this machine; "
            "run this command on a machine with exactly one node, or give --node"
        )
    return str(local_nodes[0].node_id.hex())
