"""What a pod asks for, mounts and may do."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.manifests.objects import GPU, Bundle, NodeGroup, quantity
from cluster.manifests.rules.registry import rule

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
MEMORY = "Memory"


@rule
def gpus_are_whole(bundle: Bundle) -> Iterator[str]:
    """A container's request of GPUs equals its limit: Kubernetes shares none."""
    for pod in bundle.pods:
        for container in pod.containers:
            given = container.get("resources") or {}
            asked, limit = ((given.get(kind) or {}).get(GPU) for kind in ("requests", "limits"))
            if asked != limit:
                yield f"{pod.label}: {GPU} is {asked} in requests and {limit} in limits; they must be equal"


@rule
def shared_memory_is_sized(bundle: Bundle) -> Iterator[str]:
    """/dev/shm is a volume in memory, large enough for Ray's objects, and within the container's memory."""
    for group in bundle.groups:
        volume = (group.mounted("/dev/shm") or {}).get("emptyDir")
        if volume is None or volume.get("medium") != MEMORY:
            yield (
                f"{group.label}: /dev/shm is no emptyDir of medium Memory, so it has the 64 MiB of the "
                "container "
                "runtime; mount one there"
            )
            continue
        if "sizeLimit" not in volume:
            yield f"{group.label}: the volume at /dev/shm has no sizeLimit; set one below the memory limit"
            continue
        size, memory = quantity(volume["sizeLimit"]), group.amount("limits", "memory")
        store = quantity(group.ray_start_params.get("object-store-memory", 0))
        if memory and size > memory:
            yield (
                f"{group.label}: /dev/shm may have {volume['sizeLimit']}, and the container "
                f"{memory / 2**30:g} GiB, "
                "which counts it; lower sizeLimit or raise limits.memory"
            )
        if not store or store > size:
            yield (
                f"{group.label}: rayStartParams.object-store-memory is {store / 2**30:g} GiB and /dev/shm "
                f"{volume['sizeLimit']}; set it, below sizeLimit"
            )


@rule
def disks_are_asked_for(bundle: Bundle) -> Iterator[str]:
    """Every emptyDir on disk is sized, and the container's ephemeral storage covers them all."""
    for pod in bundle.pods:
        disks = {
            name: volume["emptyDir"] or {}
            for name, volume in pod.volumes.items()
            if "emptyDir" in volume and (volume["emptyDir"] or {}).get("medium") != MEMORY
        }
        for name in (name for name, disk in disks.items() if "sizeLimit" not in disk):
            yield f"{pod.label}: emptyDir {name} has no sizeLimit, and may fill the machine's disk; set one"
        total = sum(quantity(disk.get("sizeLimit", 0)) for disk in disks.values())
        for kind in ("requests", "limits"):
            have = pod.amount(kind, "ephemeral-storage")
            if have < total:
                yield (
                    f"{pod.label}: {kind}.ephemeral-storage is {have / 2**30:g} GiB and its emptyDirs hold "
                    f"{total / 2**30:g}: the pod would be evicted when they fill; raise it"
                )


@rule
def probes_are_set(bundle: Bundle) -> Iterator[str]:
    """Ray's container says when it has started, when it is ready, and that it lives."""
    for group in bundle.groups:
        missing = [probe for probe in PROBES if probe not in group.main]
        if missing:
            yield f"{group.label}: {', '.join(missing)} is not set; ask /api/healthz at port 52365"


@rule
def pods_are_not_root(bundle: Bundle) -> Iterator[str]:
    """Pods run as a user that is not root, under the runtime's seccomp profile."""
    for pod in bundle.pods:
        context = pod.spec.get("securityContext") or {}
        user, profile = context.get("runAsUser"), (context.get("seccompProfile") or {}).get("type")
        if context.get("runAsNonRoot") is not True or not user:
            yield (
                f"{pod.label}: securityContext has runAsNonRoot {context.get('runAsNonRoot')} and runAsUser "
                f"{user}; "
                "set true and 1000, the image's user"
            )
        if profile not in ("RuntimeDefault", "Localhost"):
            yield f"{pod.label}: seccompProfile.type is {profile}; set RuntimeDefault"
        shared = [name for name in ("hostNetwork", "hostPID", "hostIPC") if pod.spec.get(name)]
        if shared or any("hostPath" in volume for volume in pod.volumes.values()):
            yield f"{pod.label}: it uses {', '.join(shared) or 'hostPath'} of its machine; remove it"


@rule
def containers_are_locked(bundle: Bundle) -> Iterator[str]:
    """Containers, the autoscaler's too, gain no privileges and cannot write their image."""
    contexts = [
        (f"{pod.label}, container {c.get('name')}", c.get("securityContext") or {})
        for pod in bundle.pods
        for c in pod.containers
    ]
    for workload in bundle.workloads:
        if workload.cluster.get("enableInTreeAutoscaling"):
            options = workload.cluster.get("autoscalerOptions") or {}
            contexts.append((f"{workload.label}, autoscalerOptions", options.get("securityContext") or {}))
    for where, context in contexts:
        wrong = {
            "allowPrivilegeEscalation: false": context.get("allowPrivilegeEscalation") is not False,
            "readOnlyRootFilesystem: true": context.get("readOnlyRootFilesystem") is not True,
            "capabilities.drop: [ALL]": "ALL" not in ((context.get("capabilities") or {}).get("drop") or []),
            "no privileged": bool(context.get("privileged")),
            "no capabilities.add": bool((context.get("capabilities") or {}).get("add")),
        }
        if missing := [fix for fix, is_wrong in wrong.items() if is_wrong]:
            yield f"{where}: securityContext lacks {'; '.join(missing)}"


@rule
def written_paths_are_mounted(bundle: Bundle) -> Iterator[str]:
    """Where the image cannot be written, /tmp, /tmp/ray and HOME are volumes."""
    for pod in bundle.pods:
        home = str(pod.env().get("HOME", {}).get("value", ""))
        wanted = [home, "/tmp", *(["/tmp/ray"] if isinstance(pod, NodeGroup) else [])]
        for path in wanted:
            if not path or pod.covering(path) is None:
                yield (
                    f"{pod.label}: {path or 'HOME'} is not on a volume, and the image is read-only; "
                    "mount an emptyDir there, and set HOME to a path on one"
                )
