"""A node that is about to go says so, and gets no new work: Ray has no public call for it."""

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


def drain(seconds: float, reason: str, address: str, node: str) -> None:
    """Tells the cluster that a node will be gone in `seconds`: it gets no new work.

    Args:
        seconds: From now.
        reason: Shown by Ray.
        address: Of the cluster; empty takes the one that this machine belongs to.
        node: Ray's id; empty takes the one on this machine.

    Raises:
        UserError: There is no Ray here, or it refuses.
    """
    configure_token_auth()
    found = address or canonicalize_bootstrap_address("auto")
    if not found:
        raise UserError("there is no Ray on this machine: give --address HEAD:6379")
    client = ray._raylet.GcsClient(address=found)
    here = node or _own_node(client, found)
    accepted, refusal = client.drain_node(
        here,
        DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        reason,
        int((time.time() + seconds) * 1000),
    )
    if not accepted:
        raise UserError(f"Ray does not drain the node {here[:12]}: {refusal}")
    print(f"node {here[:12]} gets no new work, and is expected to be gone in {seconds:g} s")


def _own_node(client: Any, address: str) -> str:
    """Ray's id of the node on this machine, by its addresses."""
    ours = {one.address for found in psutil.net_if_addrs().values() for one in found}
    ours |= {socket.gethostname()}
    alive = [node for node in client.get_all_node_info(timeout=10).values() if node.state == 0]
    here = [node for node in alive if node.node_manager_address in ours]
    if len(here) != 1:
        raise UserError(
            f"{len(here)} of the {len(alive)} nodes of the cluster at {address} are on this machine: run it "
            "where one is"
        )
    return str(here[0].node_id.hex())
