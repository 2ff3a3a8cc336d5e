"""Why a worker finds no place in the cluster. Pure.

Nodes are mappings from the names of Ray's resources to amounts, as Ray gives them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Amounts = Mapping[str, float]

_KEYS = {"GPU": "rollout.engine.tensor_parallel", "CPU": "rollout.cpus_per_worker"}
"""What sets how much of a resource a worker needs."""


def lacking(needs: Amounts, nodes: Sequence[Amounts], free: Sequence[Amounts]) -> str:
    """What keeps a worker that needs `needs` of one node from being placed, and what to do about it.

    Args:
        needs: Amount of each resource.
        nodes: What each node has, those not counted that are about to go.
        free: What is not taken of it, in the same order.

    Example:
        no node has 4 GPU, the largest node has 8 CPU and 2 GPU: lower rollout.engine.tensor_parallel, or ...
    """
    if not nodes:
        return "the cluster has no node: add nodes"
    largest = f"the largest node has {_text(max(nodes, key=_size), needs)}"
    short = [name for name, amount in needs.items() if all(node.get(name, 0) < amount for node in nodes)]
    if short:
        keys = " and ".join(_KEYS[name] for name in short)
        much = " and ".join(f"{needs[name]:g} {name}" for name in short)
        return f"no node has {much}, {largest}: lower {keys}, or add a larger node"
    fitting = [index for index, node in enumerate(nodes) if _holds(node, needs)]
    if not fitting:
        return f"no node has {_text(needs, needs)} together, {largest}: add a larger node"
    if any(_holds(free[index], needs) for index in fitting):
        return f"there is room for it now, {largest}: Ray has yet to use it, or cannot reach that node"
    taken = [name for name, amount in needs.items() if all(free[i].get(name, 0) < amount for i in fitting)]
    most = {name: max(free[index].get(name, 0) for index in fitting) for name in taken or needs}
    many = "the only node" if len(fitting) == 1 else f"each of the {len(fitting)} nodes"
    return (
        f"{' or '.join(taken or needs)} is taken on {many} that could hold it (at most {_text(most, most)} "
        f"free on one), {largest}: add nodes, or lower rollout.workers and rollout.max_workers"
    )


def _holds(node: Amounts, needs: Amounts) -> bool:
    return all(node.get(name, 0) >= amount for name, amount in needs.items())


def _size(node: Amounts) -> tuple[float, float]:
    return node.get("GPU", 0), node.get("CPU", 0)


def _text(amounts: Amounts, names: Amounts) -> str:
    return " and ".join(f"{amounts.get(name, 0):g} {name}" for name in names)
