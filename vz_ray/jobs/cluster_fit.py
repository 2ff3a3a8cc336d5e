"""Simulated placement of actors on nodes, and the reason if one does not fit. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vz_ray.jobs.resource_demands import ResourceDemand
from vz_ray.utils.placement import ResourceAmounts, explain_unschedulable, fits


@dataclass(frozen=True, slots=True)
class PlacementResult:
    """Placement of one demand.

    Attributes:
        demand: The actors to place.
        placed: Number of placed actors.
        node_count: Number of nodes that they are placed on.
        reason: Why the next actor does not fit; empty if all are placed.
        feasible: At least one node could hold an actor if it were free.
    """

    demand: ResourceDemand
    placed: int
    node_count: int
    reason: str = ""
    feasible: bool = True

    @property
    def complete(self) -> bool:
        return self.placed >= self.demand.min_count


def place_demands(
    demands: Sequence[ResourceDemand], nodes: Sequence[ResourceAmounts], free: Sequence[ResourceAmounts]
) -> list[PlacementResult]:
    """Place all demands in order, each actor on the fullest node that can hold it.

    Args:
        demands: Demands in order of decreasing placement difficulty.
        nodes: Total resources of each node.
        free: Free resources of each node, in the same order.
    """
    remaining = [dict(node) for node in free]
    results = []
    for demand in demands:
        used_nodes: set[int] = set()
        placed = 0
        while placed < demand.min_count and (index := _fullest_fitting(demand, remaining)) is not None:
            for name, amount in demand.bundle.items():
                remaining[index][name] = remaining[index].get(name, 0.0) - amount
            used_nodes.add(index)
            placed += 1
        reason = "" if placed >= demand.min_count else _explain(demand, nodes, remaining)
        feasible = any(fits(node, demand.bundle) for node in nodes)
        results.append(PlacementResult(demand, placed, len(used_nodes), reason, feasible))
    return results


def _fullest_fitting(demand: ResourceDemand, remaining: Sequence[ResourceAmounts]) -> int | None:
    """Return the fullest node that fits one actor: ranks stay close together, large gaps stay free."""
    fitting = [index for index, node in enumerate(remaining) if fits(node, demand.bundle)]
    return min(
        fitting,
        key=lambda index: (remaining[index].get("GPU", 0), remaining[index].get("CPU", 0)),
        default=None,
    )


def _explain(demand: ResourceDemand, nodes: Sequence[ResourceAmounts], remaining: Sequence[ResourceAmounts]) -> str:
    return explain_unschedulable(
        {name: amount for name, amount in demand.resources.items() if amount},
        nodes,
        remaining,
        resource_keys=demand.resource_keys,
        count_key=demand.count_key,
        node_group=demand.node_group,
        node_group_key=demand.node_group_key,
    )
