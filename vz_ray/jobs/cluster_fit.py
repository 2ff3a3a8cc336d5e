"""Where actors would go, and what keeps the others out. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vz_ray.jobs.resource_demands import ResourceDemand
from vz_ray.utils.placement import ResourceAmounts, explain_unschedulable, fits


@dataclass(frozen=True, slots=True)
class PlacementResult:
    """How many of a need find a place.

    Attributes:
        demand: What was to be placed.
        placed: How many were.
        node_count: On how many nodes.
        reason: What keeps the next one out; empty if all were placed.
        feasible: The nodes could hold each of them, if nothing else were there.
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
    needs: Sequence[ResourceDemand], nodes: Sequence[ResourceAmounts], free: Sequence[ResourceAmounts]
) -> list[PlacementResult]:
    """Places every need in turn on the nodes with the least of what it wants that still hold it.

    Args:
        needs: Those that are hardest to place first.
        nodes: What each node has.
        free: What of it is not taken, in the same order.
    """
    left = [dict(node) for node in free]
    found = []
    for need in needs:
        used: set[int] = set()
        placed = 0
        while placed < need.min_count and (index := _best(need, left)) is not None:
            for name, amount in need.bundle.items():
                left[index][name] = left[index].get(name, 0.0) - amount
            used.add(index)
            placed += 1
        why = "" if placed >= need.min_count else _why(need, nodes, left)
        ever = any(fits(node, need.bundle) for node in nodes)
        found.append(PlacementResult(need, placed, len(used), why, ever))
    return found


def _best(need: ResourceDemand, left: Sequence[ResourceAmounts]) -> int | None:
    """The fullest node that still holds one: ranks stay close, and large gaps stay whole."""
    fitting = [index for index, node in enumerate(left) if fits(node, need.bundle)]
    return min(
        fitting, key=lambda index: (left[index].get("GPU", 0), left[index].get("CPU", 0)), default=None
    )


def _why(need: ResourceDemand, nodes: Sequence[ResourceAmounts], left: Sequence[ResourceAmounts]) -> str:
    amounts = {name: amount for name, amount in need.resources.items() if amount}
    return explain_unschedulable(
        amounts,
        nodes,
        left,
        resource_keys=need.resource_keys,
        count_key=need.count_key,
        node_group=need.node_group,
        node_group_key=need.node_group_key,
    )
