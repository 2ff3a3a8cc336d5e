"""Pods of a node group, and the check that one fits a node of the site. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.config.site import SiteConfig
from vz_ray.utils.errors import UserError


@dataclass(frozen=True, slots=True)
class PodGroup:
    """Pods of a node group.

    Attributes:
        name: Node group, also the Ray resource that its pods advertise.
        min_pods: Minimum number.
        max_pods: Maximum number.
        cpus: CPUs of a pod.
        gpus: GPUs of a pod.
        memory_gib: Memory of a pod, including `shm_gib`.
        shm_gib: Size of /dev/shm.
        object_store_gib: Ray's object store, part of /dev/shm.
        scratch_gib: Size of /scratch.
        spot: On spot machines.
    """

    name: str
    min_pods: int
    max_pods: int
    cpus: float
    gpus: int
    memory_gib: int
    shm_gib: int
    object_store_gib: float
    scratch_gib: int
    spot: bool = False

    @property
    def elastic(self) -> bool:
        return self.min_pods < self.max_pods


@dataclass(frozen=True, slots=True)
class ClusterSize:
    """Pods of a workload, and the time that they need to stop.

    Attributes:
        head: The head's pod.
        groups: Worker groups.
        stop_s: Time of a job between a request to stop and its exit.
        stop_reason: How it is computed.
    """

    head: PodGroup
    groups: tuple[PodGroup, ...]
    stop_s: int
    stop_reason: str

    @property
    def elastic(self) -> bool:
        return any(group.elastic for group in self.groups)


def check_fits(group: PodGroup, site: SiteConfig) -> None:
    """Check that a pod of a group fits a node of the site.

    Raises:
        UserError: It fits none; the error names the resource and the key to change.
    """
    on_gpus = group.gpus > 0 or not site.cpu_node.cpus
    node, key = (site.gpu_node, "gpu_node") if on_gpus else (site.cpu_node, "cpu_node")
    disk = ephemeral_gib(group, scratch_on_disk=not site.scratch_class)
    fixes = {
        "gpus": "lower rollout.engine.tensor_parallel_size",
        "cpus": "lower learner.cpus_per_rank, rollout.cpus_per_worker or clips.cpus_per_actor",
        "memory_gib": "use more GPUs, lower learner.frame_cache_mib, or train with learner.lora.rank"
        if group.name == "learner"
        else "lower the number or the caches of its actors",
        "disk_gib": "lower clips.disk_cache_gib and clips.download_cache_gib, or set scratch_class",
    }
    needs = {
        "gpus": (group.gpus, node.gpus),
        "cpus": (group.cpus, node.cpus),
        "memory_gib": (group.memory_gib, node.memory_gib),
        "disk_gib": (disk, node.disk_gib),
    }
    for name, (needed, available) in needs.items():
        if needed > available:
            raise UserError(
                f"a pod of the group {group.name} needs {name} {needed:g}, and {key}.{name} is {available:g}: "
                f"{fixes[name]}, or describe larger nodes in the site file"
            )


def small_volume_gib(group: PodGroup) -> tuple[int, int]:
    """Return the sizes of /tmp and of Ray's logs."""
    return (10, 20) if group.memory_gib > 16 else (1, 1)


def ephemeral_gib(group: PodGroup, *, scratch_on_disk: bool) -> int:
    """Return the disk that a pod requests: the sum of its volumes on the node's disk."""
    return sum(small_volume_gib(group)) + (group.scratch_gib if scratch_on_disk else 0)
