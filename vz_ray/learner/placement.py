"""Ray resources of the learner's ranks."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from vz_ray.config.learner import LearnerConfig
from vz_ray.utils.placement import node_group_resources
from vz_ray.utils.timeouts import StepTimeout, with_timeout

log = logging.getLogger(__name__)

_POLL_S = 1.0
_ONE_NODE_TIMEOUT_S = 60.0
"""Time for placing all ranks on one node, if a node is large enough; then several nodes are accepted."""


class LearnerPlacement:
    """Reservation for all ranks, made before other actors take the GPUs of a node.

    The ranks share one node if a node is large enough; otherwise they are packed on few nodes. The reservation
    survives restarts of the learner, unless a node was lost: then all ranks are placed anew.

    Args:
        config: World size, CPUs per rank, node group and timeout.
        gpus_per_rank: GPUs of each rank; a fraction shares the GPU with an engine.
        worker_resources: Resources of the rollout worker in the bundle of each rank; None if workers run elsewhere.
    """

    def __init__(
        self,
        config: LearnerConfig,
        *,
        gpus_per_rank: float = 0.0,
        worker_resources: Mapping[str, float] | None = None,
    ) -> None:
        self._config, self.has_workers = config, worker_resources is not None
        self.gpus_per_rank = gpus_per_rank
        self.resources = {"CPU": config.cpus_per_rank} | ({"GPU": gpus_per_rank} if gpus_per_rank else {})
        self.resources |= node_group_resources(config.node_group)
        for name, amount in (worker_resources or {}).items():
            self.resources[name] = self.resources.get(name, 0.0) + amount
        self._group: PlacementGroup | None = None
        self._lock = asyncio.Lock()

    async def reserve(self) -> PlacementGroup:
        """Return the reservation; wait until Ray has placed it.

        Raises:
            StepTimeout: Ray could not place the ranks within `config.timeout_s`.
        """
        async with self._lock:
            return await self._reserve()

    async def _reserve(self) -> PlacementGroup:
        if self._group is not None and placement_group_table(self._group)["state"] == "CREATED":
            return self._group
        self.release()
        timeout_s = self._config.timeout_s
        if self._fits_one_node():
            try:
                return await self._place("STRICT_PACK", min(_ONE_NODE_TIMEOUT_S, timeout_s))
            except StepTimeout as error:
                log.warning("The learner's ranks are placed on several nodes: %s", error)
        return await self._place("PACK", timeout_s)

    def release(self) -> None:
        """Give the resources back, which ends the actors in them. Idempotent."""
        group, self._group = self._group, None
        if group is not None:
            remove_placement_group(group)

    def _fits_one_node(self) -> bool:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        needed = {name: amount * self._config.world_size for name, amount in self.resources.items()}
        return any(all(node.get(name, 0.0) >= amount for name, amount in needed.items()) for node in nodes)

    async def _place(self, strategy: str, timeout_s: float) -> PlacementGroup:
        group = placement_group([self.resources] * self._config.world_size, strategy=strategy)

        async def wait_until_ready() -> None:
            # Short waits: a thread that waits for the whole timeout would outlive a stop.
            while not await asyncio.to_thread(group.wait, _POLL_S):
                continue

        operation = f"placing {self._config.world_size} learner ranks of {self.resources}"
        try:
            await with_timeout(wait_until_ready(), timeout_s, target="Ray", operation=operation)
        except BaseException as error:
            remove_placement_group(group)
            if isinstance(error, StepTimeout):
                free = {name: n for name, n in ray.available_resources().items() if name in self.resources}
                raise StepTimeout("Ray", operation, timeout_s, f"the cluster has {free} free") from error
            raise
        self._group = group
        nodes = Counter(placement_group_table(group)["bundles_to_node_id"].values())
        log.info("Placed the learner's ranks: %s", ", ".join(f"{n} on node {node}" for node, n in nodes.items()))
        return group
