"""State of Ray's autoscaler: whether it is enabled, and which resources it cannot provide.

Ray exposes this state only in a protobuf message of its control service (GCS).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray._private.worker import global_worker
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group

from vz_ray.jobs.resource_demands import ResourceDemand
from vz_ray.utils.errors import UserError

REQUEST_TIMEOUT_S = 20.0
"""Maximum wait for the autoscaler to report infeasible resources; it updates its state every 5 s."""
_POLL_INTERVAL_S = 0.5
_RPC_TIMEOUT_S = 10
MAX_ATTEMPTS = 3
"""Attempts of a query: a busy head node may miss one timeout."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AutoscalerState:
    """State of the autoscaler.

    Attributes:
        enabled: The cluster has an autoscaler (version 2).
        infeasible: Resource bundles that fit on no node type.
        pending_nodes: Number of nodes that are starting.
        launch_failures: Reasons of failed node launches, newest last.
    """

    enabled: bool
    infeasible: Sequence[dict[str, float]] = ()
    pending_nodes: int = 0
    launch_failures: Sequence[str] = ()


def get_autoscaler_state() -> AutoscalerState:
    """Query the current state; blocks for up to 30 s.

    Raises:
        UserError: The cluster's control service (GCS) does not respond in any attempt.
    """
    client = global_worker.gcs_client
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            reply = GetClusterStatusReply()
            reply.ParseFromString(client.get_cluster_status(timeout_s=_RPC_TIMEOUT_S))
            return parse_cluster_status(reply)
        except (RayError, RuntimeError, TimeoutError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            log.warning(
                "No autoscaler state from the control service at %s within %d s, attempt %d of %d: %s",
                client.address, _RPC_TIMEOUT_S, attempt, MAX_ATTEMPTS, reason,
            )  # fmt: skip
    raise UserError(
        f"the control service at {client.address} did not return the autoscaler state in {MAX_ATTEMPTS} attempts "
        f"of {_RPC_TIMEOUT_S} s ({reason}). Check on the head node that gcs_server is running and has enough CPU "
        "and memory, then retry"
    )


def parse_cluster_status(reply: Any) -> AutoscalerState:
    """Convert Ray's `GetClusterStatusReply`."""
    state = reply.autoscaling_state
    gang_requests = [request for gang in state.infeasible_gang_resource_requests for request in _gang_requests(gang)]
    infeasible = [*gang_requests, *state.infeasible_resource_requests]
    launching = sum(request.count for request in state.pending_instance_requests)
    return AutoscalerState(
        enabled=state.autoscaler_state_version > 0,
        infeasible=tuple(dict(request.resources_bundle) for request in infeasible),
        pending_nodes=launching + len(state.pending_instances),
        launch_failures=tuple(request.reason for request in state.failed_instance_requests if request.reason),
    )


def _gang_requests(gang: Any) -> list[Any]:
    requests = [request for selector in gang.bundle_selectors for request in selector.resource_requests]
    return requests or list(gang.requests)


async def request_resources(demands: Sequence[ResourceDemand], timeout_s: float = REQUEST_TIMEOUT_S) -> AutoscalerState:
    """Request placement groups for `demands`, release them, and return the autoscaler state.

    The autoscaler starts nodes for them, as it would for the run. Returns when all groups are placed, when
    a demand is infeasible, or at the timeout.
    """
    groups = [
        placement_group([demand.bundle] * demand.min_count, strategy="PACK") for demand in demands if demand.min_count
    ]
    end_time = time.monotonic() + timeout_s
    try:
        while True:
            state = await asyncio.to_thread(get_autoscaler_state)
            placed = [await asyncio.to_thread(group.wait, 0) for group in groups]
            finished = all(placed) or bool(infeasible_demands(demands, state)) or not state.enabled
            if finished or time.monotonic() > end_time:
                return state
            await asyncio.sleep(_POLL_INTERVAL_S)
    finally:
        for group in groups:
            remove_placement_group(group)


def infeasible_demands(demands: Sequence[ResourceDemand], state: AutoscalerState) -> list[ResourceDemand]:
    """Return the demands that the autoscaler reports as infeasible."""
    infeasible = [{name: amount for name, amount in bundle.items() if amount} for bundle in state.infeasible]
    return [demand for demand in demands if any(_equal(demand.bundle, bundle) for bundle in infeasible)]


def _equal(bundle: dict[str, float], other: dict[str, float]) -> bool:
    return bundle.keys() == other.keys() and all(abs(bundle[name] - other[name]) < 1e-6 for name in bundle)
