"""Placement of the learner's ranks on the nodes of a Ray cluster."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import ray
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tests.learner.rank_worker import small_config
from tests.ray_nodes import RayNodes, start_ray_nodes
from vz_ray.learner.placement import LearnerPlacement
from vz_ray.rollout.worker_bundles import WorkerBundles

pytestmark = pytest.mark.integration


@pytest.fixture
def nodes() -> Iterator[RayNodes]:
    with start_ray_nodes(num_cpus=0) as nodes:
        yield nodes


def placement(world_size: int) -> LearnerPlacement:
    config = replace(small_config("nowhere", 0, world_size=world_size, cpus_per_rank=2.0), timeout_s=120.0)
    return LearnerPlacement(config)


def ranks_per_node(group: PlacementGroup) -> Counter[str]:
    return Counter(placement_group_table(group)["bundles_to_node_id"].values())


async def test_ranks_share_the_node_that_fits_them(nodes: RayNodes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    nodes.add(num_cpus=2)
    nodes.add(num_cpus=2)
    large = nodes.add(num_cpus=4)
    group = await placement(2).reserve()
    assert ranks_per_node(group) == {large.node_id: 2}
    assert f"Placed the learner's ranks: 2 on node {large.node_id}" in caplog.text


async def test_ranks_use_several_nodes_if_none_is_large_enough(nodes: RayNodes) -> None:
    nodes.add(num_cpus=2)
    nodes.add(num_cpus=4)
    assert sorted(ranks_per_node(await placement(3).reserve()).values()) == [1, 2]


async def test_reservation_is_reused_until_a_node_is_lost(nodes: RayNodes) -> None:
    first = nodes.add(num_cpus=4)
    learner = placement(2)
    group = await learner.reserve()
    assert await learner.reserve() is group
    nodes.kill(first)
    second = nodes.add(num_cpus=4)
    replaced = await learner.reserve()
    assert ranks_per_node(replaced) == {second.node_id: 2}
    learner.release()
    learner.release()


async def test_worker_of_a_rank_shares_its_bundle(nodes: RayNodes) -> None:
    """Ranks and workers need two CPUs together, so each pair fills one node."""
    for _ in range(2):
        nodes.add(num_cpus=2)
    config = replace(small_config("nowhere", 0, world_size=2), timeout_s=120.0)
    learner = LearnerPlacement(config, worker_resources={"CPU": 1.0})
    assert learner.resources == {"CPU": 2.0}
    bundles = WorkerBundles(learner.reserve, 2)
    group = await learner.reserve()
    expected = placement_group_table(group)["bundles_to_node_id"]
    actors = []
    for rank in range(2):
        in_bundle = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
        for strategy in (in_bundle, await bundles.scheduling_strategy(await bundles.take())):
            actor = NodeActor.options(num_cpus=1, scheduling_strategy=strategy).remote()  # type: ignore[attr-defined]
            assert await actor.node_id.remote() == expected[rank]
            actors.append(actor)
    learner.release()


@ray.remote
class NodeActor:
    def node_id(self) -> str:
        return str(ray.get_runtime_context().get_node_id())
