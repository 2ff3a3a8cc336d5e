"""Where actors go in a cluster, and why one finds no place. Pure.

Nodes are mappings from the names of Ray's resources to amounts, as Ray gives them. A node belongs to a
group (`rollout`, `learner`, ...) if it has a resource of the group's name; an actor of the group asks for
a speck of it, so that CPUs and GPUs alone decide how many fit on a node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Amounts = Mapping[str, float]

SPECK = 0.001
"""What an actor asks for of its group's resource, of which a node has 1."""


def of_group(group: str) -> dict[str, float]:
    """What an actor asks of Ray so that it comes to a node of `group`; nothing if that is empty."""
    return {group: SPECK} if group else {}


def holds(node: Amounts, needs: Amounts) -> bool:
    """Whether a node has as much of everything."""
    return all(node.get(name, 0) >= amount for name, amount in needs.items())


def lacking(
    needs: Amounts,
    nodes: Sequence[Amounts],
    free: Sequence[Amounts],
    *,
    keys: Mapping[str, str],
    fewer: str,
    group: str = "",
    group_key: str = "",
) -> str:
    """What keeps an actor that needs `needs` of one node from being placed, and what to do about it.

    Args:
        needs: Amount of each resource.
        nodes: What each node has, those not counted that are about to go.
        free: What is not taken of it, in the same order.
        keys: The settings that say how much of each resource it needs.
        fewer: The settings that say how many such actors there are.
        group: Of the nodes that it must come to; empty allows all.
        group_key: The setting that says so.

    Example:
        no node has 4 GPU, the largest node has 8 CPU and 2 GPU: lower rollout.engine.tensor_parallel, or ...
    """
    if not nodes:
        return "the cluster has no node: add nodes"
    if group:
        inside = [index for index, node in enumerate(nodes) if node.get(group, 0) > 0]
        if not inside:
            return (
                f"no node of the cluster is of the group {group} (none has a resource of that name): start "
                f"nodes with --resources='{{\"{group}\": 1}}', or leave {group_key} empty"
            )
        nodes, free = [nodes[index] for index in inside], [free[index] for index in inside]
    a_node = f"node of the group {group}" if group else "node"
    largest = f"the largest {a_node} has {_text(max(nodes, key=_size), needs)}"
    short = [name for name, amount in needs.items() if all(node.get(name, 0) < amount for node in nodes)]
    if short:
        lower = " and ".join(keys[name] for name in short)
        much = " and ".join(f"{needs[name]:g} {name}" for name in short)
        return f"no {a_node} has {much}, {largest}: lower {lower}, or add a larger node"
    fitting = [index for index, node in enumerate(nodes) if holds(node, needs)]
    if not fitting:
        return f"no {a_node} has {_text(needs, needs)} together, {largest}: add a larger node"
    if any(holds(free[index], needs) for index in fitting):
        return f"there is room for it now, {largest}: Ray has yet to use it, or cannot reach that node"
    taken = [name for name, amount in needs.items() if all(free[i].get(name, 0) < amount for i in fitting)]
    most = {name: max(free[index].get(name, 0) for index in fitting) for name in taken or needs}
    many = "the only node" if len(fitting) == 1 else f"each of the {len(fitting)} nodes"
    return (
        f"{' or '.join(taken or needs)} is taken on {many} that could hold it (at most {_text(most, most)} "
        f"free on one), {largest}: add nodes, or lower {fewer}"
    )


def _size(node: Amounts) -> tuple[float, float]:
    return node.get("GPU", 0), node.get("CPU", 0)


def _text(amounts: Amounts, names: Amounts) -> str:
    return " and ".join(f"{amounts.get(name, 0):g} {name}" for name in names)
