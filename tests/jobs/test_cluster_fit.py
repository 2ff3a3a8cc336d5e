"""Resource demands of configs, and simulated placement on nodes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vz_ray.config import load_config
from vz_ray.config.distill import ExemplarRunConfig
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.serve import ServeConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.jobs.cluster_fit import place_demands
from vz_ray.jobs.resource_demands import ResourceDemand, resource_demands

HEAD = {"CPU": 0.0, "head": 1.0}
GPU8 = {"CPU": 96.0, "GPU": 8.0}


def split_config(*overrides: str) -> GrpoRunConfig:
    return load_config(GrpoRunConfig, "conf/videozoomer-7b-rl-split.yaml", list(overrides))


def test_split_config_needs_16_gpus_and_16_decoders() -> None:
    ranks, workers, decoders = resource_demands(split_config(), gpus=True)
    assert (ranks.min_count, ranks.resources, ranks.gang) == (8, {"CPU": 4.0, "GPU": 1.0}, True)
    assert (workers.min_count, workers.max_count, workers.resources) == (8, 8, {"CPU": 1.0, "GPU": 1.0})
    assert (decoders.min_count, decoders.resources) == (16, {"CPU": 0.5})
    assert sum(n.min_count * n.resources.get("GPU", 0) for n in (ranks, workers, decoders)) == 16


def test_bundle_has_all_gpus_of_an_engine_and_node_group() -> None:
    config = split_config(
        "rollout.engine.tensor_parallel_size=4", "rollout.node_group=rollout", "rollout.max_workers=12"
    )
    workers = resource_demands(config, gpus=True)[1]
    assert workers.bundle == {"CPU": 1.0, "GPU": 4.0, "rollout": 0.001}
    assert (workers.min_count, workers.max_count) == (8, 12)
    assert resource_demands(config, gpus=False)[1].bundle == {"CPU": 1.0, "rollout": 0.001}


def test_rank_and_engine_share_gpu_of_colocated_run() -> None:
    bundles, decoders = resource_demands(load_config(GrpoRunConfig, "conf/videozoomer-7b-rl.yaml"), gpus=True)
    assert (bundles.name, bundles.min_count, bundles.gang) == ("learner ranks with rollout workers", 16, True)
    assert bundles.bundle == {"CPU": 5.0, "GPU": 1.0}
    assert decoders.name == "decoders"
    assert all(result.complete for result in place_demands([bundles, decoders], [GPU8] * 2, [GPU8] * 2))


def test_sft_and_serve_demands() -> None:
    sft = resource_demands(load_config(SftRunConfig, "conf/videozoomer-7b-sft.yaml", ["model=m", "data=d"]), gpus=True)
    assert [demand.name for demand in sft] == ["learner ranks", "decoders"]
    served = load_config(ServeConfig, "conf/serve/7b.yaml", ["model=m", "min_replicas=2", "max_replicas=4"])
    agents, decoders = resource_demands(served, gpus=True)
    assert (agents.name, agents.min_count, agents.max_count) == ("agents", 2, 4)
    assert decoders.min_count == 2 * served.clips.num_actors


def test_distillation_needs_decoders_only() -> None:
    overrides = [
        "teacher.model=x",
        "teacher.base_url=http://expert/v1",
        "clips.num_actors=3",
        "clips.cpus_per_actor=2",
        "tasks=t.json",
    ]
    [decoders] = resource_demands(load_config(ExemplarRunConfig, "conf/distill/needle.yaml", overrides), gpus=True)
    assert str(decoders) == "3, 2 CPU each"


def test_run_fits_on_two_nodes_but_not_on_one() -> None:
    demands = resource_demands(split_config(), gpus=True)
    two = place_demands(demands, [HEAD, GPU8, GPU8], [HEAD, GPU8, GPU8])
    assert [(result.placed, result.node_count) for result in two] == [(8, 1), (8, 1), (16, 1)]
    ranks, workers, _ = place_demands(demands, [HEAD, GPU8], [HEAD, GPU8])
    assert (ranks.complete, workers.complete, workers.placed) == (True, False, 0)
    assert workers.feasible
    assert workers.reason == (
        "GPU is in use on the only node that could take it (at most 0 GPU free on one), the largest node has "
        "96 CPU and 8 GPU: add nodes, or lower rollout.num_workers"
    )


def test_infeasible_differs_from_occupied() -> None:
    demands = resource_demands(split_config("rollout.engine.tensor_parallel_size=16"), gpus=True)
    workers = place_demands(demands, [GPU8, GPU8], [GPU8, GPU8])[1]
    assert not workers.feasible
    assert workers.reason.startswith("no node has 16 GPU, the largest node has 96 CPU and 8 GPU: lower rollout.engine")


def test_missing_node_group_is_named() -> None:
    demands = resource_demands(split_config("learner.node_group=learner"), gpus=True)
    ranks = place_demands(demands, [GPU8, GPU8], [GPU8, GPU8])[0]
    assert "in the node group learner (no node has a resource with that name)" in ranks.reason
    learner_node = GPU8 | {"learner": 1.0}
    assert place_demands(demands, [learner_node, GPU8], [learner_node, GPU8])[0].complete


@pytest.mark.parametrize("count", [0, 1, 7])
def test_small_actors_fill_the_fullest_node_first(count: int) -> None:
    small = ResourceDemand("small", {"CPU": 1.0}, count, count, resource_keys={"CPU": "x"}, count_key="y")
    large = replace(small, name="large", resources={"CPU": 16.0}, min_count=1, max_count=1)
    nodes = [{"CPU": 16.0}, {"CPU": 8.0}]
    assert [result.complete for result in place_demands([small, large], nodes, nodes)] == [True, True]
