"""Where actors would go, and what keeps the others out. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vz_ray.jobs.needs import Need
from vz_ray.observe.place import Amounts, holds, lacking


@dataclass(frozen=True, slots=True)
class Fit:
    """How many of a need find a place.

    Attributes:
        need: What was to be placed.
        placed: How many were.
        nodes: On how many nodes.
        why: What keeps the next one out; empty if all were placed.
        ever: The nodes could hold each of them, if nothing else were there.
    """

    need: Need
    placed: int
    nodes: int
    why: str = ""
    ever: bool = True

    @property
    def whole(self) -> bool:
        return self.placed >= self.need.count


def fit(needs: Sequence[Need], nodes: Sequence[Amounts], free: Sequence[Amounts]) -> list[Fit]:
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
        while placed < need.count and (index := _best(need, left)) is not None:
            for name, amount in need.bundle.items():
                left[index][name] = left[index].get(name, 0.0) - amount
            used.add(index)
            placed += 1
        why = "" if placed >= need.count else _why(need, nodes, left)
        ever = any(holds(node, need.bundle) for node in nodes)
        found.append(Fit(need, placed, len(used), why, ever))
    return found


def _best(need: Need, left: Sequence[Amounts]) -> int | None:
    """The fullest node that still holds one: ranks stay close, and large gaps stay whole."""
    fitting = [index for index, node in enumerate(left) if holds(node, need.bundle)]
    return min(
        fitting, key=lambda index: (left[index].get("GPU", 0), left[index].get("CPU", 0)), default=None
    )


def _why(need: Need, nodes: Sequence[Amounts], left: Sequence[Amounts]) -> str:
    amounts = {name: amount for name, amount in need.amounts.items() if amount}
    return lacking(
        amounts, nodes, left, keys=need.keys, fewer=need.fewer, group=need.group, group_key=need.group_key
    )
