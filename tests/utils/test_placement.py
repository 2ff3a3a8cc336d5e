"""Explanations for actors that cannot be scheduled."""

from __future__ import annotations

import pytest

from vz_ray.utils.placement import explain_unschedulable, node_group_resources

KEYS = {"GPU": "rollout.engine.tensor_parallel_size", "CPU": "rollout.cpus_per_worker"}
COUNT_KEY = "rollout.num_workers and rollout.max_workers"
HEAD, SMALL, LARGE = {"CPU": 8.0}, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 96.0, "GPU": 8.0}


@pytest.mark.parametrize(
    ("required", "nodes", "free", "message"),
    [
        ({"CPU": 1}, [], [], "the cluster has no node: add nodes"),
        (
            {"CPU": 1, "GPU": 4},
            [HEAD, SMALL],
            [HEAD, SMALL],
            "no node has 4 GPU, the largest node has 16 CPU and 2 GPU: "
            "lower rollout.engine.tensor_parallel_size, or add a larger node",
        ),
        (
            {"CPU": 200, "GPU": 16},
            [SMALL, LARGE],
            [SMALL, LARGE],
            "no node has 200 CPU and 16 GPU, the largest node has 96 CPU and 8 GPU: "
            "lower rollout.cpus_per_worker and rollout.engine.tensor_parallel_size, or add a larger node",
        ),
        (
            {"CPU": 64, "GPU": 1},
            [{"CPU": 64.0}, SMALL],
            [{"CPU": 64.0}, SMALL],
            "no node has 64 CPU and 1 GPU together, the largest node has 16 CPU and 2 GPU: add a larger node",
        ),
        (
            {"CPU": 1, "GPU": 4},
            [HEAD, SMALL, LARGE, LARGE],
            [HEAD, SMALL, {"CPU": 90.0, "GPU": 3.0}, {"CPU": 90.0}],
            "GPU is in use on each of the 2 nodes that could take it (at most 3 GPU free on one), "
            "the largest node has 96 CPU and 8 GPU: "
            "add nodes, or lower rollout.num_workers and rollout.max_workers",
        ),
        (
            {"CPU": 1, "GPU": 1},
            [SMALL, SMALL],
            [{"CPU": 16.0}, {"GPU": 2.0}],
            "CPU or GPU is in use on each of the 2 nodes that could take it (at most 16 CPU and 2 GPU free on "
            "one), the largest node has 16 CPU and 2 GPU: "
            "add nodes, or lower rollout.num_workers and rollout.max_workers",
        ),
        (
            {"CPU": 1},
            [HEAD],
            [HEAD],
            "a node has enough free resources, the largest node has 8 CPU: Ray has not used it yet, or cannot reach it",
        ),
        (
            {"CPU": 2},
            [{"CPU": 1.0}, {"CPU": 2.0}],
            [{"CPU": 1.0}, {"CPU": 0.5}],
            "CPU is in use on the only node that could take it (at most 0.5 CPU free on one), "
            "the largest node has 2 CPU: add nodes, or lower rollout.num_workers and rollout.max_workers",
        ),
    ],
)
def test_missing_resource_is_named(
    required: dict[str, float], nodes: list[dict[str, float]], free: list[dict[str, float]], message: str
) -> None:
    assert explain_unschedulable(required, nodes, free, resource_keys=KEYS, count_key=COUNT_KEY) == message


def test_only_nodes_of_the_node_group_count() -> None:
    rollout = SMALL | {"rollout": 1.0}
    nodes = [HEAD, LARGE | {"learner": 1.0}, rollout]
    options = {
        "resource_keys": KEYS,
        "count_key": COUNT_KEY,
        "node_group": "rollout",
        "node_group_key": "rollout.node_group",
    }
    assert explain_unschedulable({"GPU": 4}, nodes, nodes, **options) == (
        "no node of the group rollout has 4 GPU, the largest node of the group rollout has 2 GPU: "
        "lower rollout.engine.tensor_parallel_size, or add a larger node"
    )
    assert explain_unschedulable({"GPU": 1}, nodes[:2], nodes[:2], **options) == (
        "no node of the cluster is in the node group rollout (no node has a resource with that name): start nodes "
        "with --resources='{\"rollout\": 1}', or leave rollout.node_group empty"
    )
    assert node_group_resources("rollout") == {"rollout": 0.001}
    assert node_group_resources("") == {}
