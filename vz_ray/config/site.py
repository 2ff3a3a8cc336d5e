"""Config of a Kubernetes cluster: what rendered manifests need to know about it, and no run changes."""

from __future__ import annotations

from dataclasses import dataclass, field

from vz_ray.config.fields import InvalidValueError, Section, number


@dataclass
class NodeTypeConfig(Section):
    """Allocatable resources of the nodes of a kind: capacity minus what the system and daemon sets use."""

    cpus: float = number(0, minimum=0)
    """CPUs of a node; 0: there are no such nodes."""
    memory_gib: float = number(0, minimum=0)
    """Memory in GiB."""
    disk_gib: float = number(0, minimum=0)
    """Ephemeral storage in GiB: the local disk for caches, spilled objects and logs."""
    gpus: int = number(0, minimum=0)
    """GPUs."""
    gpu: str = "H100"
    """Name of the GPU, as for `vz-ray plan --gpu`."""
    selector: dict[str, str] = field(default_factory=dict)
    """Labels that select these nodes."""
    extra_resources: dict[str, str] = field(default_factory=dict)
    """Further resources of each learner pod, such as `rdma/ib: "8"` or `vpc.amazonaws.com/efa: "32"`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus and not self.cpus:
            raise InvalidValueError("gpus", f"is {self.gpus} and cpus is 0; set cpus, or gpus: 0", "cpus")
        for key in ("memory_gib", "disk_gib"):
            if self.cpus and not getattr(self, key):
                raise InvalidValueError(key, "is 0; a node with CPUs has some, see `kubectl describe node`", "cpus")


@dataclass
class ClaimsConfig(Section):
    """Names of the PersistentVolumeClaims; an empty name mounts none."""

    runs: str = "vz-ray-runs"
    """Run directories, at /runs; writable from every node."""
    videos: str = "vz-ray-videos"
    """Videos and task files, at /videos; read only, except for a quickstart."""
    models: str = "vz-ray-models"
    """Models and downloads of the hub, at /models."""
    uploads: str = "vz-ray-uploads"
    """Files that clients of a service send, at /uploads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("runs", "models"):
            if not getattr(self, key):
                raise InvalidValueError(key, "is empty; every workload needs this claim")


@dataclass
class SiteConfig(Section):
    """A cluster: nodes, storage, image."""

    namespace: str = "vz-ray"
    """Namespace of all workloads; `k8s/site` creates it."""
    image: str = "registry.example.org/vz-ray:0.1.0-ray2.60.0-cu130"
    """Image of all pods. Its tag names the Ray version."""
    pull_secret: str = ""
    """Secret for a private registry."""
    gpu_node: NodeTypeConfig = field(
        default_factory=lambda: NodeTypeConfig(cpus=96, memory_gib=960, disk_gib=400, gpus=8)
    )
    """Nodes with GPUs."""
    cpu_node: NodeTypeConfig = field(default_factory=lambda: NodeTypeConfig(cpus=30, memory_gib=112, disk_gib=400))
    """Nodes without GPUs, for heads and decoders. With `cpus: 0` decoders run in the pods with GPUs."""
    claims: ClaimsConfig = field(default_factory=ClaimsConfig)
    """Storage."""
    scratch_class: str = ""
    """Storage class of generic ephemeral volumes for /scratch; empty uses the node's disk."""
    storage_gbps: float = number(0.2, above=0)
    """Rate at which a checkpoint is written to the claim of runs, in GB/s. Grace periods depend on it."""
    spot_notice_s: int = number(120, minimum=25)
    """Time between the notice and the end of a spot machine, in seconds: AWS 120, Google and Azure 30."""
    spot_required: bool = True
    """Rollout pods of `--spot` run on spot nodes only; false also allows others."""
    nodes_timeout_s: int = number(7200, minimum=60)
    """Time in which nodes must be available and their pods ready, including the start of engines."""
    labels: dict[str, str] = field(default_factory=dict)
    """Further labels of each workload, for example of a gang scheduler or of a team."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if ":" not in self.image.rpartition("/")[2]:
            raise InvalidValueError("image", f"is {self.image!r}; it must have a tag, or nodes run different code")
        if self.cpu_node.gpus:
            raise InvalidValueError("cpu_node.gpus", f"is {self.cpu_node.gpus}; it must be 0")
        if not self.cpu_node.cpus and not self.gpu_node.cpus:
            raise InvalidValueError("cpu_node.cpus", "is 0, and so is gpu_node.cpus; describe one kind of node")
