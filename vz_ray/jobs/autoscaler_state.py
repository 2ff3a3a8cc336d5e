"""What Ray's autoscaler says: whether there is one, and what it can never provide.

Ray offers these figures in a message of its own protocol alone.
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
"""How long it is given to say that something cannot be had: it looks every five seconds."""
_TICK_S = 0.5
_RPC_S = 10
MAX_ATTEMPTS = 3
"""How often the control service is asked: a head that is busy may miss one deadline."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AutoscalerState:
    """The autoscaler's state.

    Attributes:
        enabled: There is one.
        infeasible: Bundles that no node type of it has room for.
        pending_nodes: Nodes that are being started.
        launch_failures: Why nodes could not be started, newest last.
    """

    enabled: bool
    infeasible: Sequence[dict[str, float]] = ()
    pending_nodes: int = 0
    launch_failures: Sequence[str] = ()


def get_autoscaler_state() -> AutoscalerState:
    """As of now; blocks for half a minute at most.

    Raises:
        UserError: The control service (GCS) of the cluster did not say, each time that it was asked.
    """
    client = global_worker.gcs_client
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            reply = GetClusterStatusReply()
            reply.ParseFromString(client.get_cluster_status(timeout_s=_RPC_S))
            return parse_cluster_status(reply)
        except (RayError, RuntimeError, TimeoutError) as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            log.warning(
                "the cluster's control service at %s was asked for the autoscaler's state and did not say "
                "within %d s, attempt %d of %d: %s",
                client.address, _RPC_S, attempt, MAX_ATTEMPTS, why,
            )  # fmt: skip
    raise UserError(
        f"the cluster's control service at {client.address} did not say how its autoscaler is, {MAX_ATTEMPTS} times "
        f"within {_RPC_S} s each ({why}): see on the head node whether gcs_server runs, and is not short of "
        "CPU or memory, then try again"
    )


def parse_cluster_status(reply: Any) -> AutoscalerState:
    """The parts of Ray's message that count here."""
    state = reply.autoscaling_state
    gangs = [request for gang in state.infeasible_gang_resource_requests for request in _requests(gang)]
    refused = [*gangs, *state.infeasible_resource_requests]
    return AutoscalerState(
        enabled=state.autoscaler_state_version > 0,
        infeasible=tuple(dict(request.resources_bundle) for request in refused),
        pending_nodes=sum(one.count for one in state.pending_instance_requests)
        + len(state.pending_instances),
        launch_failures=tuple(one.reason for one in state.failed_instance_requests if one.reason),
    )


def _requests(gang: Any) -> list[Any]:
    flat = [request for selector in gang.bundle_selectors for request in selector.resource_requests]
    return flat or list(gang.requests)


async def request_resources(
    needs: Sequence[ResourceDemand], seconds: float = REQUEST_TIMEOUT_S
) -> AutoscalerState:
    """Asks for room for `needs`, and takes it back: what the autoscaler then says of it.

    It starts nodes for what it can provide, as it would for the run. Returns as soon as all have a place
    or something is called infeasible, and after `seconds` at the latest.
    """
    places = [
        placement_group([need.bundle] * need.min_count, strategy="PACK") for need in needs if need.min_count
    ]
    until = time.monotonic() + seconds
    try:
        while True:
            state = await asyncio.to_thread(get_autoscaler_state)
            placed = [await asyncio.to_thread(place.wait, 0) for place in places]
            over = all(placed) or bool(infeasible_demands(needs, state)) or not state.enabled
            if over or time.monotonic() > until:
                return state
            await asyncio.sleep(_TICK_S)
    finally:
        for place in places:
            remove_placement_group(place)


def infeasible_demands(needs: Sequence[ResourceDemand], state: AutoscalerState) -> list[ResourceDemand]:
    """Those that the autoscaler has said it can never provide."""
    refused = [{name: amount for name, amount in bundle.items() if amount} for bundle in state.infeasible]
    return [need for need in needs if any(_same(need.bundle, bundle) for bundle in refused)]


def _same(bundle: dict[str, float], other: dict[str, float]) -> bool:
    return bundle.keys() == other.keys() and all(abs(bundle[name] - other[name]) < 1e-6 for name in bundle)
