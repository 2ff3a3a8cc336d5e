"""Placement of Ray actors on nodes, and explanations for actors that cannot be scheduled. Pure.

A node is a mapping from Ray resource names to amounts. A node belongs to a node group (`rollout`, `learner`,
...) if it has a resource with the group's name. An actor of the group requests a tiny amount of that resource,
so only CPUs and GPUs limit the number of actors on a node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ResourceAmounts = Mapping[str, float]

NODE_GROUP_AMOUNT = 0.001
"""Amount of the group's resource that an actor requests; a node has 1."""


def node_group_resources(node_group: str) -> dict[str, float]:
    """Return the Ray resources that place an actor on a node of `node_group`; empty without a group."""
    return {node_group: NODE_GROUP_AMOUNT} if node_group else {}


def fits(node: ResourceAmounts, required: ResourceAmounts) -> bool:
    """Return whether a node has all required amounts."""
    return all(node.get(name, 0) >= amount for name, amount in required.items())


def explain_unschedulable(
    required: ResourceAmounts,
    nodes: Sequence[ResourceAmounts],
    free: Sequence[ResourceAmounts],
    *,
    resource_keys: Mapping[str, str],
    count_key: str,
    node_group: str = "",
    node_group_key: str = "",
) -> str:
    """Explain why no node can take an actor, and how to fix it.

    Args:
        nodes: Total resources of each node, without nodes that are about to be removed.
        free: Free resources of each node, in the same order.
        resource_keys: Config key that sets the amount of each resource.
        count_key: Config key that sets the number of such actors.
        node_group: Required node group; empty allows all nodes.
        node_group_key: Config key that sets the node group.

    Example:
        no node has 4 GPU, the largest node has 8 CPU and 2 GPU: lower rollout.engine.tensor_parallel_size, or ...
    """
    if not nodes:
        return "the cluster has no node: add nodes"
    if node_group:
        members = [index for index, node in enumerate(nodes) if node.get(node_group, 0) > 0]
        if not members:
            return (
                f"no node of the cluster is in the node group {node_group} (no node has a resource with that "
                f"name): start nodes with --resources='{{\"{node_group}\": 1}}', or leave {node_group_key} empty"
            )
        nodes, free = [nodes[index] for index in members], [free[index] for index in members]
    node_text = f"node of the group {node_group}" if node_group else "node"
    largest = f"the largest {node_text} has {_format_amounts(max(nodes, key=_node_size), required)}"
    missing = [name for name, amount in required.items() if all(node.get(name, 0) < amount for node in nodes)]
    if missing:
        keys = " and ".join(resource_keys[name] for name in missing)
        amounts = " and ".join(f"{required[name]:g} {name}" for name in missing)
        return f"no {node_text} has {amounts}, {largest}: lower {keys}, or add a larger node"
    candidates = [index for index, node in enumerate(nodes) if fits(node, required)]
    if not candidates:
        amounts = _format_amounts(required, required)
        return f"no {node_text} has {amounts} together, {largest}: add a larger node"
    if any(fits(free[index], required) for index in candidates):
        return f"a node has enough free resources, {largest}: Ray has not used it yet, or cannot reach it"
    taken = [name for name, amount in required.items() if all(free[i].get(name, 0) < amount for i in candidates)]
    max_free = {name: max(free[index].get(name, 0) for index in candidates) for name in taken or required}
    count = "the only node" if len(candidates) == 1 else f"each of the {len(candidates)} nodes"
    return (
        f"{' or '.join(taken or required)} is in use on {count} that could take it (at most "
        f"{_format_amounts(max_free, max_free)} free on one), {largest}: add nodes, or lower {count_key}"
    )


def _node_size(node: ResourceAmounts) -> tuple[float, float]:
    return node.get("GPU", 0), node.get("CPU", 0)


def _format_amounts(amounts: ResourceAmounts, names: ResourceAmounts) -> str:
    return " and ".join(f"{amounts.get(name, 0):g} {name}" for name in names)
