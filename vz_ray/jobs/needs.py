"""What a config asks of a cluster. Pure.

A `Need` is a number of actors that are alike, each on one node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vz_ray.config.clips import ClipsConfig
from vz_ray.config.distill import DistillConfig
from vz_ray.config.learner import LearnerConfig
from vz_ray.config.run import PlayConfig, RunConfig
from vz_ray.config.serve import ServeConfig
from vz_ray.config.sft import SftRunConfig
from vz_ray.observe.place import Amounts, of_group

ClusterConfig = PlayConfig | SftRunConfig | DistillConfig | ServeConfig
"""What is run on a cluster."""


@dataclass(frozen=True, slots=True)
class Need:
    """Actors that are alike.

    Attributes:
        who: What they are called, in the plural.
        amounts: What each needs of one node.
        count: How many there must be before anything is done.
        most: How many there may be.
        group: Of the nodes that they must come to; empty allows all.
        gang: All of them are placed, or none.
        keys: The settings that say how much of each resource one needs.
        fewer: The settings that say how many there are.
        group_key: The setting that names the group.
    """

    who: str
    amounts: Amounts
    count: int
    most: int
    group: str = ""
    gang: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    fewer: str = ""
    group_key: str = ""

    @property
    def bundle(self) -> dict[str, float]:
        """What one of them asks of Ray."""
        return {name: amount for name, amount in self.amounts.items() if amount} | of_group(self.group)

    def __str__(self) -> str:
        much = " and ".join(f"{amount:g} {name}" for name, amount in self.amounts.items() if amount)
        where = f", in the group {self.group}" if self.group else ""
        return f"{self.count}, {much or 'nothing reserved'} each{where}"


def needs_of(config: ClusterConfig, *, gpus: bool, gpu_share: float = 1.0) -> list[Need]:
    """Everything that a run of `config` places, those that are hardest to place first.

    Args:
        config: Of the run.
        gpus: Whether engines and ranks get GPUs.
        gpu_share: What a rank and an engine each have of one.
    """
    if isinstance(config, ServeConfig):
        return [_agents(config, gpus), _decoders(config.clips, replicas=config.min_replicas)]
    if isinstance(config, DistillConfig):
        return [_decoders(config.clips)]
    if isinstance(config, SftRunConfig):
        return [_ranks(config.learner, float(gpus)), _decoders(config.clips)]
    ranks = [_ranks(config.learner, gpu_share * gpus)] if isinstance(config, RunConfig) else []
    return [*ranks, _workers(config, gpu_share * gpus), _decoders(config.clips)]


def _ranks(config: LearnerConfig, gpus: float) -> Need:
    return Need(
        "learner ranks",
        {"CPU": 1.0, "GPU": gpus},
        config.ranks,
        config.ranks,
        config.group,
        gang=True,
        keys={"CPU": "learner.ranks", "GPU": "learner.ranks"},
        fewer="learner.ranks",
        group_key="learner.group",
    )


def _workers(config: PlayConfig, gpus: float) -> Need:
    rollout = config.rollout
    return Need(
        "rollout workers",
        {"CPU": rollout.cpus_per_worker, "GPU": rollout.engine.tensor_parallel * gpus},
        rollout.workers,
        rollout.most_workers,
        rollout.group,
        keys={"CPU": "rollout.cpus_per_worker", "GPU": "rollout.engine.tensor_parallel"},
        fewer="rollout.workers",
        group_key="rollout.group",
    )


def _decoders(config: ClipsConfig, replicas: int = 1) -> Need:
    return Need(
        "decoders",
        {"CPU": config.cpus},
        config.actors * replicas,
        config.most_actors * replicas,
        config.group,
        keys={"CPU": "clips.cpus"},
        fewer="clips.actors",
        group_key="clips.group",
    )


def _agents(config: ServeConfig, gpus: bool) -> Need:
    return Need(
        "agents",
        {"CPU": config.cpus_per_replica, "GPU": float(config.engine.tensor_parallel * gpus)},
        config.min_replicas,
        config.max_replicas,
        config.group,
        keys={"CPU": "cpus_per_replica", "GPU": "engine.tensor_parallel"},
        fewer="min_replicas",
        group_key="group",
    )


def model_bytes(model: str) -> int:
    """Size of a checkpoint's weights; 0 where there are none."""
    return sum(path.stat().st_size for path in Path(model).glob("*.safetensors")) if model else 0
