"""What a config asks of a cluster, and where its actors would go."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vz_ray.config import load
from vz_ray.config.distill import ExemplarConfig
from vz_ray.config.run import RunConfig
from vz_ray.config.serve import ServeConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.jobs.fit import fit
from vz_ray.jobs.needs import Need, needs_of

HEAD = {"CPU": 0.0, "head": 1.0}
GPU8 = {"CPU": 96.0, "GPU": 8.0}


def paper(*overrides: str) -> RunConfig:
    return load(RunConfig, "conf/videozoomer-7b-rl.yaml", list(overrides))


def test_the_paper_asks_for_sixteen_gpus_and_a_place_for_its_decoders() -> None:
    ranks, workers, decoders = needs_of(paper(), gpus=True)
    assert (ranks.count, ranks.amounts, ranks.gang) == (8, {"CPU": 1.0, "GPU": 1.0}, True)
    assert (workers.count, workers.most, workers.amounts) == (8, 8, {"CPU": 1.0, "GPU": 1.0})
    assert (decoders.count, decoders.amounts) == (16, {"CPU": 0.5})
    assert sum(n.count * n.amounts.get("GPU", 0) for n in (ranks, workers, decoders)) == 16


def test_engines_of_several_gpus_ask_for_them_together_and_groups_go_along() -> None:
    config = paper("rollout.engine.tensor_parallel=4", "rollout.group=rollout", "rollout.max_workers=12")
    workers = needs_of(config, gpus=True)[1]
    assert workers.bundle == {"CPU": 1.0, "GPU": 4.0, "rollout": 0.001}
    assert (workers.count, workers.most) == (8, 12)
    assert needs_of(config, gpus=False)[1].bundle == {"CPU": 1.0, "rollout": 0.001}


def test_a_rank_and_an_engine_share_a_gpu_where_weights_go_by_ipc() -> None:
    config = load(RunConfig, "conf/tiny.yaml", ["weights.transport=ipc"])
    found = fit(needs_of(config, gpus=True, gpu_share=0.5), [{"CPU": 8, "GPU": 1}], [{"CPU": 8, "GPU": 1}])
    assert all(one.whole for one in found)


def test_other_commands_ask_for_what_they_start() -> None:
    sft = needs_of(load(SftRunConfig, "conf/videozoomer-7b-sft.yaml", ["model=m", "data=d"]), gpus=True)
    assert [need.who for need in sft] == ["learner ranks", "decoders"]
    served = load(ServeConfig, "conf/serve/7b.yaml", ["model=m", "min_replicas=2", "max_replicas=4"])
    agents, decoders = needs_of(served, gpus=True)
    assert (agents.who, agents.count, agents.most) == ("agents", 2, 4)
    assert decoders.count == 2 * served.clips.actors


def test_a_distillation_asks_for_its_decoders_alone() -> None:
    given = [
        "expert.model=x",
        "expert.base_url=http://expert/v1",
        "clips.actors=3",
        "clips.cpus=2",
        "tasks=t.json",
    ]
    [decoders] = needs_of(load(ExemplarConfig, "conf/distill/needle.yaml", given), gpus=True)
    assert str(decoders) == "3, 2 CPU each"


def test_a_run_finds_room_on_two_nodes_and_not_on_one() -> None:
    needs = needs_of(paper(), gpus=True)
    two = fit(needs, [HEAD, GPU8, GPU8], [HEAD, GPU8, GPU8])
    assert [(one.placed, one.nodes) for one in two] == [(8, 1), (8, 1), (16, 1)]
    ranks, workers, _ = fit(needs, [HEAD, GPU8], [HEAD, GPU8])
    assert (ranks.whole, workers.whole, workers.placed) == (True, False, 0)
    assert workers.ever
    assert workers.why == (
        "GPU is taken on the only node that could hold it (at most 0 GPU free on one), the largest node has "
        "96 CPU and 8 GPU: add nodes, or lower rollout.workers"
    )


def test_what_no_node_could_ever_hold_is_told_from_what_is_taken() -> None:
    needs = needs_of(paper("rollout.engine.tensor_parallel=16"), gpus=True)
    workers = fit(needs, [GPU8, GPU8], [GPU8, GPU8])[1]
    assert not workers.ever
    assert workers.why.startswith(
        "no node has 16 GPU, the largest node has 96 CPU and 8 GPU: lower rollout.engine"
    )


def test_a_group_that_nobody_belongs_to_is_named() -> None:
    needs = needs_of(paper("learner.group=learner"), gpus=True)
    ranks = fit(needs, [GPU8, GPU8], [GPU8, GPU8])[0]
    assert "of the group learner (none has a resource of that name)" in ranks.why
    there = GPU8 | {"learner": 1.0}
    assert fit(needs, [there, GPU8], [there, GPU8])[0].whole


@pytest.mark.parametrize("count", [0, 1, 7])
def test_small_ones_go_to_the_fullest_node_so_that_large_gaps_stay(count: int) -> None:
    small = Need("small", {"CPU": 1.0}, count, count, keys={"CPU": "x"}, fewer="y")
    large = replace(small, who="large", amounts={"CPU": 16.0}, count=1, most=1)
    nodes = [{"CPU": 16.0}, {"CPU": 8.0}]
    assert [one.whole for one in fit([small, large], nodes, nodes)] == [True, True]
