"""What rules ask about: the objects of an overlay, its workloads, and their groups of pods."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Manifest = dict[str, Any]

NODE_GROUPS = ("head", "learner", "rollout", "clips", "serve")
"""Who there may be; each names the Ray resource that its actors ask for."""
GPU = "nvidia.com/gpu"
STANDARD = ("CPU", "GPU", "TPU", "memory")
"""Ray's own resources; others are markers."""
CLUSTER = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig", "RayCluster": ""}
"""Where each kind keeps the specification of its cluster."""

_UNITS = {
    "": 1.0,
    "m": 1e-3,
    **{unit: 1000.0**power for power, unit in enumerate("kMGTPE", 1)},
    **{f"{unit}i": 1024.0**power for power, unit in enumerate("KMGTPE", 1)},
}


def quantity(text: object) -> float:
    """A Kubernetes quantity as a number.

    Raises:
        ValueError: It is none.

    Example: `quantity("500m")` -> 0.5, `quantity("2Gi")` -> 2147483648.0
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:[eE][0-9]+)?)([a-zA-Z]{0,2})\s*", str(text))
    if not found or found[2] not in _UNITS:
        raise ValueError(f"{text!r} is not a quantity such as 500m, 8 or 32Gi")
    return float(found[1]) * _UNITS[found[2]]


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod template and where it stands, for messages.

    Attributes:
        label: Such as `RayJob vz-ray-rl, learner`.
        template: With `metadata` and `spec`.
    """

    label: str
    template: Manifest

    @property
    def spec(self) -> Manifest:
        return dict(self.template.get("spec") or {})

    @property
    def labels(self) -> Manifest:
        return dict((self.template.get("metadata") or {}).get("labels") or {})

    @property
    def containers(self) -> list[Manifest]:
        return [*(self.spec.get("containers") or []), *(self.spec.get("initContainers") or [])]

    @property
    def main(self) -> Manifest:
        """The first container, which is Ray's."""
        return next(iter(self.spec.get("containers") or []), {})

    @property
    def volumes(self) -> dict[str, Manifest]:
        return {volume.get("name", ""): volume for volume in self.spec.get("volumes") or []}

    @property
    def grace_s(self) -> float:
        """Seconds between the wish to end it and its end; 30 is Kubernetes' default."""
        return float(self.spec.get("terminationGracePeriodSeconds", 30))

    def amount(self, kind: str, name: str) -> float:
        """What the main container has of a resource, by `requests` or `limits`; 0 without."""
        given = ((self.main.get("resources") or {}).get(kind) or {}).get(name)
        return 0.0 if given is None else quantity(given)

    def env(self) -> dict[str, Manifest]:
        return {entry.get("name", ""): entry for entry in self.main.get("env") or []}

    def mounted(self, path: str) -> Manifest | None:
        """The volume at exactly this path of the main container."""
        for mount in self.main.get("volumeMounts") or []:
            if mount.get("mountPath") == path:
                return self.volumes.get(mount.get("name", ""))
        return None

    def covering(self, path: str) -> Manifest | None:
        """The volume that a path of the main container lies on; none if it is the image's."""
        mounts = self.main.get("volumeMounts") or []
        above = [m for m in mounts if f"{path}/".startswith(f"{str(m.get('mountPath')).rstrip('/')}/")]
        nearest = max(above, key=lambda m: len(str(m.get("mountPath"))), default=None)
        return self.volumes.get(nearest.get("name", "")) if nearest else None

    def hook(self) -> str:
        """The command of the main container's preStop hook; empty without one."""
        before = ((self.main.get("lifecycle") or {}).get("preStop") or {}).get("exec") or {}
        return " ".join(map(str, before.get("command") or []))


@dataclass(frozen=True, slots=True)
class NodeGroup(Pod):
    """The head, or a group of workers.

    Attributes:
        name: `head`, or the group's.
        group_spec: The group's specification, the pod template in it.
    """

    name: str
    group_spec: Manifest

    @property
    def is_head(self) -> bool:
        return self.name == "head"

    def replicas(self) -> tuple[int, int, int]:
        """Fewest, wanted and most pods; wanted is the fewest where it is not said."""
        if self.is_head:
            return 1, 1, 1
        fewest = int(self.group_spec.get("minReplicas", 0))
        return (
            fewest,
            int(self.group_spec.get("replicas", fewest)),
            int(self.group_spec.get("maxReplicas", fewest)),
        )

    @property
    def ray_start_params(self) -> dict[str, str]:
        """Arguments of `ray start`."""
        return dict(self.group_spec.get("rayStartParams") or {})

    @property
    def resources(self) -> dict[str, float]:
        """What Ray is told that a pod has: of the group, else of `ray start`, else the container's limits."""
        told: dict[str, float] = {"CPU": self.amount("limits", "cpu"), "GPU": self.amount("limits", GPU)}
        if "num-cpus" in self.ray_start_params:
            told["CPU"] = quantity(self.ray_start_params["num-cpus"])
        if "num-gpus" in self.ray_start_params:
            told["GPU"] = quantity(self.ray_start_params["num-gpus"])
        if "resources" in self.ray_start_params:
            told |= json.loads(self.ray_start_params["resources"].strip("'\"").replace('\\"', '"'))
        return told | {name: quantity(n) for name, n in (self.group_spec.get("resources") or {}).items()}

    @property
    def node_group_resources(self) -> set[str]:
        """Ray resources that are not Ray's own: groups whose actors may run here."""
        return {name for name, amount in self.resources.items() if amount and name not in STANDARD}

    @property
    def spot(self) -> bool:
        """Whether Ray is told that its nodes may be taken away."""
        return (self.group_spec.get("labels") or {}).get("ray.io/market-type") == "spot"


@dataclass(frozen=True)
class RayWorkload:
    """A RayJob, RayCluster or RayService.

    Attributes:
        manifest: As rendered.
    """

    manifest: Manifest

    @property
    def kind(self) -> str:
        return str(self.manifest["kind"])

    @property
    def label(self) -> str:
        return f"{self.kind} {(self.manifest.get('metadata') or {}).get('name')}"

    @property
    def spec(self) -> Manifest:
        return dict(self.manifest.get("spec") or {})

    @property
    def annotations(self) -> dict[str, str]:
        return dict((self.manifest.get("metadata") or {}).get("annotations") or {})

    @property
    def cluster(self) -> Manifest:
        inside = CLUSTER[self.kind]
        return dict(self.spec.get(inside) or {}) if inside else self.spec

    @cached_property
    def head(self) -> NodeGroup:
        spec = self.cluster.get("headGroupSpec") or {}
        return NodeGroup(f"{self.label}, head", spec.get("template") or {}, "head", spec)

    @cached_property
    def workers(self) -> list[NodeGroup]:
        return [
            NodeGroup(
                f"{self.label}, {spec.get('groupName')}",
                spec.get("template") or {},
                str(spec.get("groupName")),
                spec,
            )
            for spec in self.cluster.get("workerGroupSpecs") or []
        ]

    @property
    def groups(self) -> list[NodeGroup]:
        return [self.head, *self.workers]

    @property
    def pods(self) -> list[Pod]:
        """All templates: of the groups, and of who submits the job."""
        submitter = self.spec.get("submitterPodTemplate")
        return [*self.groups, *([Pod(f"{self.label}, submitter", submitter)] if submitter else [])]

    @property
    def runs_jobs(self) -> bool:
        """Whether drivers run here, and leave checkpoints."""
        return self.kind != "RayService"

    def groups_with_resource(self, marker: str) -> list[NodeGroup]:
        """Groups whose pods carry a marker."""
        return [group for group in self.groups if marker in group.node_group_resources]


@dataclass(frozen=True)
class Bundle:
    """All that an overlay renders to.

    Attributes:
        manifests: Objects, in any order.
    """

    manifests: Sequence[Manifest]

    @cached_property
    def workloads(self) -> list[RayWorkload]:
        return [RayWorkload(m) for m in self.manifests if m.get("kind") in CLUSTER]

    @property
    def groups(self) -> Iterator[NodeGroup]:
        return (group for workload in self.workloads for group in workload.groups)

    @property
    def pods(self) -> Iterator[Pod]:
        return (pod for workload in self.workloads for pod in workload.pods)

    def of(self, kind: str) -> list[Manifest]:
        return [manifest for manifest in self.manifests if manifest.get("kind") == kind]

    def names(self, kind: str) -> set[str]:
        return {str((manifest.get("metadata") or {}).get("name")) for manifest in self.of(kind)}
