"""What Ray's autoscaler says: whether there is one, and what it can never provide.

Ray offers these figures in a message of its own protocol alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.util.placement_group import placement_group, remove_placement_group

from vz_ray.jobs.needs import Need

ASK_S = 20.0
"""How long it is given to say that something cannot be had: it looks every five seconds."""
_TICK_S = 0.5
_RPC_S = 10


@dataclass(frozen=True, slots=True)
class Scaling:
    """The autoscaler's state.

    Attributes:
        alive: There is one.
        infeasible: Bundles that no node type of it has room for.
        pending: Nodes that are being started.
        failed: Why nodes could not be started, newest last.
    """

    alive: bool
    infeasible: Sequence[dict[str, float]] = ()
    pending: int = 0
    failed: Sequence[str] = ()


def scaling() -> Scaling:
    """As of now."""
    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    reply = GetClusterStatusReply()
    reply.ParseFromString(client.get_cluster_status(timeout_s=_RPC_S))
    return read(reply)


def read(reply: Any) -> Scaling:
    """The parts of Ray's message that count here."""
    state = reply.autoscaling_state
    gangs = [request for gang in state.infeasible_gang_resource_requests for request in _requests(gang)]
    refused = [*gangs, *state.infeasible_resource_requests]
    return Scaling(
        alive=state.autoscaler_state_version > 0,
        infeasible=tuple(dict(request.resources_bundle) for request in refused),
        pending=sum(one.count for one in state.pending_instance_requests) + len(state.pending_instances),
        failed=tuple(one.reason for one in state.failed_instance_requests if one.reason),
    )


def _requests(gang: Any) -> list[Any]:
    flat = [request for selector in gang.bundle_selectors for request in selector.resource_requests]
    return flat or list(gang.requests)


async def ask_for(needs: Sequence[Need], seconds: float = ASK_S) -> Scaling:
    """Asks for room for `needs`, and takes it back: what the autoscaler then says of it.

    It starts nodes for what it can provide, as it would for the run. Returns as soon as all have a place
    or something is called infeasible, and after `seconds` at the latest.
    """
    places = [placement_group([need.bundle] * need.count, strategy="PACK") for need in needs if need.count]
    until = time.monotonic() + seconds
    try:
        while True:
            state = await asyncio.to_thread(scaling)
            placed = [await asyncio.to_thread(place.wait, 0) for place in places]
            over = all(placed) or bool(infeasible_of(needs, state)) or not state.alive
            if over or time.monotonic() > until:
                return state
            await asyncio.sleep(_TICK_S)
    finally:
        for place in places:
            remove_placement_group(place)


def infeasible_of(needs: Sequence[Need], state: Scaling) -> list[Need]:
    """Those that the autoscaler has said it can never provide."""
    refused = [{name: amount for name, amount in bundle.items() if amount} for bundle in state.infeasible]
    return [need for need in needs if any(_same(need.bundle, bundle) for bundle in refused)]


def _same(bundle: dict[str, float], other: dict[str, float]) -> bool:
    return bundle.keys() == other.keys() and all(abs(bundle[name] - other[name]) < 1e-6 for name in bundle)
