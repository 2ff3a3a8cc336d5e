"""Pod templates: security, storage, probes, hooks, placement. docs/kubernetes.md explains the values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vz_ray.config.quickstart import QuickstartConfig
from vz_ray.config.serve import ServeConfig
from vz_ray.config.site import SiteConfig
from vz_ray.k8s.pod_group import ClusterSize, PodGroup, ephemeral_gib, small_volume_gib
from vz_ray.k8s.pod_sizes import STOP_MARGIN_S
from vz_ray.k8s.run_spec import CONFIG_DIR, SCRATCH, RunSpec

Manifest = dict[str, Any]

GPU = "nvidia.com/gpu"
LOCKED: Manifest = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
"""Security context of every container."""
USER: Manifest = {
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "runAsGroup": 100,
    "fsGroup": 100,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
"""Security context of every pod."""
SPOT_LABELS = (
    ("karpenter.sh/capacity-type", "spot"),
    ("eks.amazonaws.com/capacityType", "SPOT"),
    ("cloud.google.com/gke-spot", "true"),
    ("kubernetes.azure.com/scalesetpriority", "spot"),
    ("vz-ray/spot", "true"),
)
"""Labels of spot nodes: Karpenter, EKS, GKE, AKS, and one to set by hand."""
LOST_NODE_S = 30
"""Time after which a pod on a lost node is replaced. KubeRay fails a job whose head is unreachable for 300 s, which is
Kubernetes' default for this time."""
SPOT_MARKET = {"ray.io/market-type": "spot"}
"""Ray label of nodes that are never in an NCCL group."""
SECRETS = (
    ("JUDGE_API_KEY", "vz-ray-judge", "api_key"),
    ("HF_TOKEN", "vz-ray-hub", "token"),
    ("WANDB_API_KEY", "vz-ray-wandb", "api_key"),
)
"""Optional secrets of runs: environment variable, name, key."""
HEALTH = {"path": "/api/healthz", "port": 52365}
"""Health check of a Ray node's agent."""


@dataclass(frozen=True, slots=True)
class PodStop:
    """How a pod stops.

    Attributes:
        command: preStop hook; empty: none.
        grace_s: Time until the pod is killed, including the hook.
    """

    command: tuple[str, ...]
    grace_s: int


def pod_stop(run: RunSpec, size: ClusterSize, group: PodGroup, site: SiteConfig) -> PodStop:
    """Return the hook of a group's pods: wait for the job's checkpoint, or drain."""
    hook_s = size.stop_s + STOP_MARGIN_S
    if isinstance(run.config, ServeConfig):
        hook_s = int(run.config.timeouts.drain_s) + STOP_MARGIN_S
        return PodStop((), 60) if group.name == "head" else _drain(hook_s, hook_s + STOP_MARGIN_S)
    if group.name in ("head", "learner"):
        # The learner's hook needs no network: deleting a cluster deletes the head's address first.
        hook = "stop-jobs" if group.name == "head" else "wait-idle"
        command = ("python", "-m", "cluster.hooks", hook, "--seconds", str(hook_s))
        return PodStop(command, hook_s + STOP_MARGIN_S)
    notice_s = site.spot_notice_s if group.spot else 120
    return _drain(int(min(0.75 * notice_s, notice_s - 10)), notice_s)


def _drain(seconds: int, grace_s: int) -> PodStop:
    command = f"vz-ray drain --seconds {seconds}; python -m cluster.hooks wait-idle --seconds {seconds}"
    return PodStop(("sh", "-c", command), grace_s)


def pod_template(run: RunSpec, size: ClusterSize, group: PodGroup, site: SiteConfig) -> Manifest:
    """Return the pod template of a group."""
    is_head = group.name == "head"
    node = site.gpu_node if group.gpus or not site.cpu_node.cpus else site.cpu_node
    stop = pod_stop(run, size, group, site)
    spec: Manifest = {"serviceAccountName": "vz-ray-head" if is_head else "vz-ray-worker"}
    if not is_head:
        spec["automountServiceAccountToken"] = False
    spec |= {"terminationGracePeriodSeconds": stop.grace_s, "securityContext": USER}
    if site.pull_secret:
        spec["imagePullSecrets"] = [{"name": site.pull_secret}]
    if node.selector:
        spec["nodeSelector"] = dict(node.selector)
    if affinity := _affinity(group, site):
        spec["affinity"] = affinity
    spec["tolerations"] = _tolerations(group)
    if group.name == "serve":
        spec["topologySpreadConstraints"] = [_spread(run)]
    spec["containers"] = [_container(run, size, group, site, stop)]
    spec["volumes"] = _volumes(run, group, site)
    return {"metadata": {"labels": pod_labels(run, group.name)}, "spec": spec}


def pod_labels(run: RunSpec, group: str) -> dict[str, str]:
    """Return the labels that policies, budgets and monitoring select."""
    workload = "cluster" if run.request.kind == "cluster" else run.command
    return {"vz-ray/workload": workload, "vz-ray/run": run.request.name, "vz-ray/group": group}


def _affinity(group: PodGroup, site: SiteConfig) -> Manifest:
    """Head and learner avoid spot nodes; spot pods ask for them; others may run anywhere."""
    if group.spot:
        terms = [{"matchExpressions": [_label(key, "In", value)]} for key, value in SPOT_LABELS]
        if site.spot_required:
            return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}
        preferred = [{"weight": 100, "preference": term} for term in terms]
        return {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}}
    if group.name in ("head", "learner"):
        term = {"matchExpressions": [_label(key, "NotIn", value) for key, value in SPOT_LABELS]}
        return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}}
    return {}


def _label(key: str, operator: str, value: str) -> Manifest:
    return {"key": key, "operator": operator, "values": [value]}


def _tolerations(group: PodGroup) -> list[Manifest]:
    tolerations: list[Manifest] = [
        {
            "key": f"node.kubernetes.io/{state}",
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": LOST_NODE_S,
        }
        for state in ("unreachable", "not-ready")
    ]
    if group.gpus:
        tolerations.append({"key": GPU, "operator": "Exists", "effect": "NoSchedule"})
    if group.spot:
        tolerations += [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key, _ in SPOT_LABELS]
    return tolerations


def _spread(run: RunSpec) -> Manifest:
    return {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": pod_labels(run, "serve")},
    }


def _container(run: RunSpec, size: ClusterSize, group: PodGroup, site: SiteConfig, stop: PodStop) -> Manifest:
    is_head, served = group.name == "head", isinstance(run.config, ServeConfig)
    amounts = {
        "cpu": f"{group.cpus:g}" if group.cpus == int(group.cpus) else f"{1000 * group.cpus:.0f}m",
        "memory": f"{group.memory_gib}Gi",
        "ephemeral-storage": f"{ephemeral_gib(group, scratch_on_disk=not site.scratch_class)}Gi",
    }
    if group.gpus:
        amounts[GPU] = str(group.gpus)
    if group.name == "learner" and group.gpus:
        amounts |= site.gpu_node.extra_resources
    container: Manifest = {
        "name": "ray-head" if is_head else "ray-worker",
        "image": site.image,
        "env": _env(run, size),
        "ports": _ports(is_head=is_head, served=served),
        # Equal requests and limits: the kernel kills such pods last.
        "resources": {"requests": amounts, "limits": dict(amounts)},
    }
    if stop.command:
        container["lifecycle"] = {"preStop": {"exec": {"command": list(stop.command)}}}
    readiness = _probe(HEALTH, 10, 6)
    if group.name == "serve":
        # Health check of the proxy: it succeeds on nodes with an engine, and fails while the node drains.
        readiness = _probe({"path": "/-/healthz", "port": 8000}, 5, 2)
    container |= {
        "startupProbe": _probe(HEALTH, 5, 60),
        "readinessProbe": readiness,
        "livenessProbe": _probe(HEALTH, 10, 60),
        "securityContext": LOCKED,
        "volumeMounts": _mounts(run, site),
    }
    return container


def _probe(target: Manifest, period_s: int, failures: int) -> Manifest:
    return {"httpGet": dict(target), "periodSeconds": period_s, "timeoutSeconds": 5, "failureThreshold": failures}


def _env(run: RunSpec, size: ClusterSize) -> list[Manifest]:
    """The image is read-only, so caches are on volumes. Ray's own defaults are named where they are changed."""
    values = {
        "HOME": SCRATCH,
        "XDG_CACHE_HOME": f"{SCRATCH}/cache",
        "HF_HOME": "/models/huggingface",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # Ray gives worker processes the lowest CPU priority
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    served = isinstance(run.config, ServeConfig)
    if not served:
        values["RAY_JOB_STOP_WAIT_TIME_S"] = str(size.stop_s)  # Ray kills a job after 3 seconds
    env = [{"name": name, "value": value} for name, value in values.items()]
    if served:
        env.append(_secret("VZ_RAY_KEYS", "vz-ray-keys", "hashes", optional=False))
    secrets = SECRETS[1:2] if served else SECRETS
    return [*env, *(_secret(name, secret, key, optional=True) for name, secret, key in secrets)]


def _secret(name: str, secret: str, key: str, *, optional: bool) -> Manifest:
    reference: Manifest = {"name": secret, "key": key}
    if optional:
        reference["optional"] = True
    return {"name": name, "valueFrom": {"secretKeyRef": reference}}


def _ports(*, is_head: bool, served: bool) -> list[Manifest]:
    ports = {"metrics": 8080}
    if is_head:
        ports = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, **ports}
        ports |= {"as-metrics": 44217, "dash-metrics": 44227}
    if served:
        ports["serve"] = 8000
    return [{"name": name, "containerPort": port} for name, port in ports.items()]


def _claims(run: RunSpec, site: SiteConfig) -> dict[str, str]:
    """Return the claim of each volume."""
    served = isinstance(run.config, ServeConfig)
    names = ("runs", "models", "uploads") if served else ("runs", "videos", "models")
    claims = {name: str(getattr(site.claims, name)) for name in names}
    return {name: claim for name, claim in claims.items() if claim}


def _mounts(run: RunSpec, site: SiteConfig) -> list[Manifest]:
    mounts: list[Manifest] = [{"name": name, "mountPath": f"/{name}"} for name in _claims(run, site)]
    for mount in mounts:
        # A quickstart makes its videos.
        if mount["name"] == "videos" and not isinstance(run.config, QuickstartConfig):
            mount["readOnly"] = True
    if run.config_text:
        mounts.append({"name": "config", "mountPath": CONFIG_DIR, "readOnly": True})
    paths = {"shared-memory": "/dev/shm", "scratch": SCRATCH, "tmp": "/tmp", "ray-logs": "/tmp/ray"}
    return [*mounts, *({"name": name, "mountPath": path} for name, path in paths.items())]


def _volumes(run: RunSpec, group: PodGroup, site: SiteConfig) -> list[Manifest]:
    """Every emptyDir has a size; the autoscaler's container mounts `ray-logs` too."""
    volumes: list[Manifest] = [
        {"name": name, "persistentVolumeClaim": {"claimName": claim}} for name, claim in _claims(run, site).items()
    ]
    if run.config_text:
        volumes.append({"name": "config", "configMap": {"name": f"{run.request.name}-config"}})
    tmp, logs = small_volume_gib(group)
    return [
        *volumes,
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{group.shm_gib}Gi"}},
        _scratch(group, site),
        {"name": "tmp", "emptyDir": {"sizeLimit": f"{tmp}Gi"}},
        {"name": "ray-logs", "emptyDir": {"sizeLimit": f"{logs}Gi"}},
    ]


def _scratch(group: PodGroup, site: SiteConfig) -> Manifest:
    size = f"{group.scratch_gib}Gi"
    if not site.scratch_class:
        return {"name": "scratch", "emptyDir": {"sizeLimit": size}}
    claim = {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": site.scratch_class,
        "resources": {"requests": {"storage": size}},
    }
    return {"name": "scratch", "ephemeral": {"volumeClaimTemplate": {"spec": claim}}}
