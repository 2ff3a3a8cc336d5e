"""Where actors go in a cluster, and why one finds no place. Pure.

Nodes are mappings from the names of Ray's resources to amounts, as Ray gives them. A node belongs to a
group (`rollout`, `learner`, ...) if it has a resource of the group's name; an actor of the group asks for
a speck of it, so that CPUs and GPUs alone decide how many fit on a node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ResourceAmounts = Mapping[str, float]

NODE_GROUP_AMOUNT = 0.001
"""What an actor asks for of its group's resource, of which a node has 1."""


def node_group_resources(node_group: str) -> dict[str, float]:
    """What an actor asks of Ray so that it comes to a node of `node_group`; nothing if that is empty."""
    return {node_group: NODE_GROUP_AMOUNT} if node_group else {}


def fits(node: ResourceAmounts, required: ResourceAmounts) -> bool:
    """Whether a node has as much of everything."""
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
    """What keeps an actor that needs `required` of one node from being placed, and what to do about it.

    Args:
        required: Amount of each resource.
        nodes: What each node has, those not counted that are about to go.
        free: What is not taken of it, in the same order.
        resource_keys: The settings that say how much of each resource it needs.
        count_key: The settings that say how many such actors there are.
        node_group: Of the nodes that it must come to; empty allows all.
        node_group_key: The setting that says so.

    Example:
        no node has 4 GPU, the largest node has 8 CPU and 2 GPU: lower rollout.engine.tensor_parallel_size, or ...
    """
    if not nodes:
        return "the cluster has no node: add nodes"
    if node_group:
        inside = [index for index, node in enumerate(nodes) if node.get(node_group, 0) > 0]
        if not inside:
            return (
                f"no node of the cluster is of the group {node_group} (none has a resource of that name): start "
                f"nodes with --resources='{{\"{node_group}\": 1}}', or leave {node_group_key} empty"
            )
        nodes, free = [nodes[index] for index in inside], [free[index] for index in inside]
    a_node = f"node of the group {node_group}" if node_group else "node"
    largest = f"the largest {a_node} has {_text(max(nodes, key=_size), required)}"
    short = [name for name, amount in required.items() if all(node.get(name, 0) < amount for node in nodes)]
    if short:
        lower = " and ".join(resource_keys[name] for name in short)
        much = " and ".join(f"{required[name]:g} {name}" for name in short)
        return f"no {a_node} has {much}, {largest}: lower {lower}, or add a larger node"
    fitting = [index for index, node in enumerate(nodes) if fits(node, required)]
    if not fitting:
        return f"no {a_node} has {_text(required, required)} together, {largest}: add a larger node"
    if any(fits(free[index], required) for index in fitting):
        return f"there is room for it now, {largest}: Ray has yet to use it, or cannot reach that node"
    taken = [name for name, amount in required.items() if all(free[i].get(name, 0) < amount for i in fitting)]
    most = {name: max(free[index].get(name, 0) for index in fitting) for name in taken or required}
    many = "the only node" if len(fitting) == 1 else f"each of the {len(fitting)} nodes"
    return (
        f"{' or '.join(taken or required)} is taken on {many} that could hold it (at most {_text(most, most)} "
        f"free on one), {largest}: add nodes, or lower {count_key}"
    )


def _size(node: ResourceAmounts) -> tuple[float, float]:
    return node.get("GPU", 0), node.get("CPU", 0)


def _text(amounts: ResourceAmounts, names: ResourceAmounts) -> str:
    return " and ".join(f"{amounts.get(name, 0):g} {name}" for name in names)
