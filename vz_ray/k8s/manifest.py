"""Access to rendered manifests: workloads, node groups, quantities."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vz_ray.k8s.pod_spec import GPU, Manifest
from vz_ray.utils.errors import UserError

CLUSTER_FIELD = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig", "RayCluster": ""}
"""Field of a workload's spec with its Ray cluster."""
_STANDARD_RESOURCES = ("CPU", "GPU", "memory")
_UNITS = {
    "": 1.0,
    "m": 1e-3,
    **{unit: 1000.0**power for power, unit in enumerate("kMGTPE", 1)},
    **{f"{unit}i": 1024.0**power for power, unit in enumerate("KMGTPE", 1)},
}


def read_manifests(file: Path) -> list[Manifest]:
    """Read the objects of a YAML stream.

    Raises:
        UserError: The file cannot be read, is not YAML, or contains something else than Kubernetes objects.
    """
    try:
        documents = list(yaml.safe_load_all(file.read_text()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {getattr(error, 'strerror', error)}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    for index, document in enumerate(documents, 1):
        if not isinstance(document, dict) or not {"kind", "apiVersion", "metadata"} <= set(document):
            raise UserError(f"document {index} of {file} is no Kubernetes object: it needs apiVersion, kind, metadata")
    if not documents:
        raise UserError(f"{file} is empty; `vz-ray k8s render` writes it")
    return documents


def parse_quantity(text: object) -> float:
    """Return a Kubernetes quantity as a number: `500m` -> 0.5, `2Gi` -> 2147483648.0.

    Raises:
        UserError: `text` is not a quantity.
    """
    match = re.fullmatch(r"([0-9.]+)([a-zA-Z]{0,2})", str(text))
    if not match or match[2] not in _UNITS:
        raise UserError(f"{text!r} is not a quantity such as 500m or 2Gi")
    return float(match[1]) * _UNITS[match[2]]


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """The head or a worker group of a Ray cluster."""

    name: str
    spec: Manifest

    @property
    def pod(self) -> Manifest:
        return dict(self.spec["template"]["spec"])

    @property
    def labels(self) -> Manifest:
        return dict(self.spec["template"]["metadata"]["labels"])

    @property
    def container(self) -> Manifest:
        """The Ray container."""
        return dict(self.pod["containers"][0])

    @property
    def env(self) -> dict[str, Manifest]:
        return {entry["name"]: entry for entry in self.container.get("env", [])}

    @property
    def max_replicas(self) -> int:
        return 1 if self.name == "head" else int(self.spec["maxReplicas"])

    @property
    def limits(self) -> dict[str, float]:
        return {name: parse_quantity(value) for name, value in self.container["resources"]["limits"].items()}

    @property
    def resources(self) -> dict[str, float]:
        """Resources that Ray advertises for a pod: the group's, or the container's limits."""
        defaults = {"CPU": self.limits.get("cpu", 0.0), "GPU": self.limits.get(GPU, 0.0)}
        own = {name: parse_quantity(value) for name, value in self.spec.get("resources", {}).items()}
        return {**defaults, **own}

    @property
    def node_groups(self) -> set[str]:
        """Names of the node groups whose actors may run here."""
        return {name for name, amount in self.resources.items() if amount and name not in _STANDARD_RESOURCES}

    @property
    def is_spot(self) -> bool:
        return bool(self.spec.get("labels", {}).get("ray.io/market-type") == "spot")

    def mount_of(self, path: str) -> Manifest | None:
        """Return the mount that contains `path`; None if the path is in the image."""
        mounts = [
            mount
            for mount in self.container["volumeMounts"]
            if f"{path}/".startswith(mount["mountPath"].rstrip("/") + "/")
        ]
        return max(mounts, key=lambda mount: len(mount["mountPath"]), default=None)

    def volume_of(self, path: str) -> Manifest | None:
        """Return the volume that contains `path`; None if the path is in the image."""
        mount = self.mount_of(path)
        if mount is None:
            return None
        return next((volume for volume in self.pod["volumes"] if volume["name"] == mount["name"]), None)

    @property
    def hook(self) -> str:
        """Command of the preStop hook; empty without a hook."""
        pre_stop = self.container.get("lifecycle", {}).get("preStop", {})
        return " ".join(pre_stop.get("exec", {}).get("command", []))

    def hook_seconds(self, command: str) -> float:
        """Return the `--seconds` of a command in the preStop hook; 0 if the hook does not call it."""
        match = re.search(rf"{re.escape(command)} --seconds ([0-9.]+)", self.hook)
        return float(match[1]) if match else 0.0


@dataclass(frozen=True, slots=True)
class Workload:
    """A RayJob, RayService or RayCluster."""

    manifest: Manifest

    @property
    def kind(self) -> str:
        return str(self.manifest["kind"])

    @property
    def name(self) -> str:
        return str(self.manifest["metadata"]["name"])

    @property
    def spec(self) -> Manifest:
        return dict(self.manifest["spec"])

    @property
    def cluster(self) -> Manifest:
        field = CLUSTER_FIELD[self.kind]
        return dict(self.spec[field]) if field else self.spec

    @property
    def groups(self) -> list[NodeGroup]:
        """The head and the worker groups."""
        workers = [NodeGroup(spec["groupName"], spec) for spec in self.cluster["workerGroupSpecs"]]
        return [NodeGroup("head", self.cluster["headGroupSpec"]), *workers]

    @property
    def pods(self) -> list[Manifest]:
        """Pod specs of all groups and of the job submitter."""
        submitter = self.spec.get("submitterPodTemplate")
        return [*(group.pod for group in self.groups), *([submitter["spec"]] if submitter else [])]

    @property
    def serve_application(self) -> Manifest:
        """The application of a RayService."""
        (application,) = yaml.safe_load(self.spec["serveConfigV2"])["applications"]
        return dict(application)


def workload_of(manifests: Sequence[Manifest]) -> Workload:
    """Return the only workload among `manifests`.

    Raises:
        UserError: There is no workload, or there are several.
    """
    found: list[Any] = [manifest for manifest in manifests if manifest["kind"] in CLUSTER_FIELD]
    if len(found) != 1:
        raise UserError(f"got {len(found)} workloads; a file has one of {', '.join(CLUSTER_FIELD)}")
    return Workload(found[0])
