"""Why a worker finds no place: what is lacking, where the most of it is, and what to do."""

from __future__ import annotations

import pytest

from vz_ray.utils.placement import explain_unschedulable, node_group_resources

KEYS = {"GPU": "rollout.engine.tensor_parallel_size", "CPU": "rollout.cpus_per_worker"}
FEWER = "rollout.num_workers and rollout.max_workers"
HEAD, SMALL, LARGE = {"CPU": 8.0}, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 96.0, "GPU": 8.0}


@pytest.mark.parametrize(
    ("needs", "nodes", "free", "said"),
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
            "GPU is taken on each of the 2 nodes that could hold it (at most 3 GPU free on one), "
            "the largest node has 96 CPU and 8 GPU: "
            "add nodes, or lower rollout.num_workers and rollout.max_workers",
        ),
        (
            {"CPU": 1, "GPU": 1},
            [SMALL, SMALL],
            [{"CPU": 16.0}, {"GPU": 2.0}],
            "CPU or GPU is taken on each of the 2 nodes that could hold it (at most 16 CPU and 2 GPU free on "
            "one), the largest node has 16 CPU and 2 GPU: "
            "add nodes, or lower rollout.num_workers and rollout.max_workers",
        ),
        (
            {"CPU": 1},
            [HEAD],
            [HEAD],
            "there is room for it now, the largest node has 8 CPU: "
            "Ray has yet to use it, or cannot reach that node",
        ),
        (
            {"CPU": 2},
            [{"CPU": 1.0}, {"CPU": 2.0}],
            [{"CPU": 1.0}, {"CPU": 0.5}],
            "CPU is taken on the only node that could hold it (at most 0.5 CPU free on one), "
            "the largest node has 2 CPU: add nodes, or lower rollout.num_workers and rollout.max_workers",
        ),
    ],
)
def test_what_is_lacking_is_named(
    needs: dict[str, float], nodes: list[dict[str, float]], free: list[dict[str, float]], said: str
) -> None:
    assert explain_unschedulable(needs, nodes, free, resource_keys=KEYS, count_key=FEWER) == said


def test_only_nodes_of_the_group_count() -> None:
    rollout = SMALL | {"rollout": 1.0}
    whole = [HEAD, LARGE | {"learner": 1.0}, rollout]
    ask = {"keys": KEYS, "fewer": FEWER, "group": "rollout", "group_key": "rollout.node_group"}
    assert explain_unschedulable({"GPU": 4}, whole, whole, **ask) == (
        "no node of the group rollout has 4 GPU, the largest node of the group rollout has 2 GPU: "
        "lower rollout.engine.tensor_parallel_size, or add a larger node"
    )
    assert explain_unschedulable({"GPU": 1}, whole[:2], whole[:2], **ask) == (
        "no node of the cluster is of the group rollout (none has a resource of that name): start nodes with "
        "--resources='{\"rollout\": 1}', or leave rollout.node_group empty"
    )
    assert node_group_resources("rollout") == {"rollout": 0.001}
    assert node_group_resources("") == {}
