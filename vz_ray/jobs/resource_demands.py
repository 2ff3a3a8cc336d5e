"""Actors that a config starts on a cluster, and their resources. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from vz_ray.config.clips import ClipsConfig
from vz_ray.config.distill import DistillRunConfig
from vz_ray.config.learner import LearnerConfig
from vz_ray.config.rollout import RolloutConfig
from vz_ray.config.run import GrpoRunConfig, RolloutRunConfig
from vz_ray.config.serve import ServeConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.utils.placement import ResourceAmounts, node_group_resources

ClusterConfig = RolloutRunConfig | SftRunConfig | DistillRunConfig | ServeConfig
"""Config of any command that runs on a cluster."""
LEARNER_RANKS, ROLLOUT_WORKERS, TEACHER_WORKERS = "learner ranks", "rollout workers", "teacher workers"


@dataclass(frozen=True, slots=True)
class ResourceDemand:
    """A number of identical actors, each on one node.

    Attributes:
        name: Display name, plural.
        resources: Resources of one actor.
        min_count: Number of actors that must start before the run begins.
        max_count: Maximum number of actors.
        node_group: Required node group; empty allows all nodes.
        gang: Either all actors are placed or none.
        resource_keys: Config key of each resource amount.
        count_key: Config key of the number of actors.
        node_group_key: Config key of the node group.
    """

    name: str
    resources: ResourceAmounts
    min_count: int
    max_count: int
    node_group: str = ""
    gang: bool = False
    resource_keys: Mapping[str, str] = field(default_factory=dict)
    count_key: str = ""
    node_group_key: str = ""

    @property
    def bundle(self) -> dict[str, float]:
        """Resources that one actor requests from Ray, including its node group."""
        amounts = {name: amount for name, amount in self.resources.items() if amount}
        return amounts | node_group_resources(self.node_group)

    def __str__(self) -> str:
        amounts = " and ".join(f"{amount:g} {name}" for name, amount in self.resources.items() if amount)
        node_group = f", node group {self.node_group}" if self.node_group else ""
        return f"{self.min_count}, {amounts or 'no resources'} each{node_group}"


def resource_demands(config: ClusterConfig, *, gpus: bool) -> list[ResourceDemand]:
    """Return the actors of a run, in order of decreasing placement difficulty.

    Args:
        config: Config of the run.
        gpus: Engines and learner ranks use GPUs.
    """
    if isinstance(config, ServeConfig):
        return [_agents(config, gpus), _decoders(config.clips, replicas=config.min_replicas)]
    if isinstance(config, DistillRunConfig):
        return [_decoders(config.clips)]
    if isinstance(config, SftRunConfig):
        return [_ranks(config.learner, float(gpus)), _decoders(config.clips)]
    if isinstance(config, GrpoRunConfig):
        ranks, workers = _ranks(config.learner, float(gpus)), _workers(config.rollout, gpus)
        actors = [_share_gpus(ranks, workers)] if config.shares_gpus else [ranks, workers]
        if config.teacher.enabled:
            actors.append(_workers(config.teacher, gpus, TEACHER_WORKERS, "teacher"))
        return [*actors, _decoders(config.clips)]
    return [_workers(config.rollout, gpus), _decoders(config.clips)]


def _share_gpus(ranks: ResourceDemand, workers: ResourceDemand) -> ResourceDemand:
    """Return the demand for bundles of one rank and one worker on one GPU."""
    cpus = ranks.resources["CPU"] + workers.resources["CPU"]
    cpu_keys = f"{ranks.resource_keys['CPU']} and {workers.resource_keys['CPU']}"
    return replace(
        ranks,
        name=f"{LEARNER_RANKS} with {ROLLOUT_WORKERS}",
        resources={**ranks.resources, "CPU": cpus},
        resource_keys={**ranks.resource_keys, "CPU": cpu_keys},
    )


def _ranks(config: LearnerConfig, gpus: float) -> ResourceDemand:
    return ResourceDemand(
        LEARNER_RANKS,
        {"CPU": config.cpus_per_rank, "GPU": gpus},
        config.world_size,
        config.world_size,
        config.node_group,
        gang=True,
        resource_keys={"CPU": "learner.cpus_per_rank", "GPU": "learner.world_size"},
        count_key="learner.world_size",
        node_group_key="learner.node_group",
    )


def _workers(
    rollout: RolloutConfig, gpus: float, name: str = ROLLOUT_WORKERS, section: str = "rollout"
) -> ResourceDemand:
    return ResourceDemand(
        name,
        {"CPU": rollout.cpus_per_worker, "GPU": rollout.engine.tensor_parallel_size * gpus},
        rollout.num_workers,
        rollout.worker_limit,
        rollout.node_group,
        resource_keys={"CPU": f"{section}.cpus_per_worker", "GPU": f"{section}.engine.tensor_parallel_size"},
        count_key=f"{section}.num_workers",
        node_group_key=f"{section}.node_group",
    )


def _decoders(config: ClipsConfig, replicas: int = 1) -> ResourceDemand:
    return ResourceDemand(
        "decoders",
        {"CPU": config.cpus_per_actor},
        config.num_actors * replicas,
        config.actor_limit * replicas,
        config.node_group,
        resource_keys={"CPU": "clips.cpus_per_actor"},
        count_key="clips.num_actors",
        node_group_key="clips.node_group",
    )


def _agents(config: ServeConfig, gpus: bool) -> ResourceDemand:
    return ResourceDemand(
        "agents",
        {"CPU": config.cpus_per_replica, "GPU": float(config.engine.tensor_parallel_size * gpus)},
        config.min_replicas,
        config.max_replicas,
        config.node_group,
        resource_keys={"CPU": "cpus_per_replica", "GPU": "engine.tensor_parallel_size"},
        count_key="min_replicas",
        node_group_key="node_group",
    )


def checkpoint_bytes(model: str) -> int:
    """Return the size of a checkpoint's weights; 0 if there are none."""
    return sum(path.stat().st_size for path in Path(model).glob("*.safetensors")) if model else 0
