"""Render the manifests of a run: one template for RayJob, RayCluster and RayService."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import yaml

from vz_ray.config.serve import ServeConfig
from vz_ray.config.site import SiteConfig
from vz_ray.k8s.pod_group import ClusterSize, PodGroup
from vz_ray.k8s.pod_sizes import IDLE_S, STOP_MARGIN_S, size_cluster
from vz_ray.k8s.pod_spec import LOCKED, SPOT_MARKET, USER, Manifest, pod_labels, pod_template
from vz_ray.k8s.run_spec import SCRATCH, RenderRequest, RunSpec, load_run
from vz_ray.utils.placement import NODE_GROUP_AMOUNT

AUTH = {"mode": "token", "secretName": "vz-ray-auth"}
MAX_RETRIES = 3
"""New clusters after a failure. Each deletes the logs of the last one, so that more would hide a broken config."""
SUBMIT_RETRIES = 5
FINISHED_TTL_S = 900
"""Time for which a finished job keeps its cluster."""
STOP_REASON = "vz-ray/stop-seconds"
"""Annotation: time that a stop needs, and how it is computed."""


def render(request: RenderRequest, site: SiteConfig) -> list[Manifest]:
    """Return the objects of a run: config map if its config is not in the image, workload, disruption budgets.

    Raises:
        UserError: The config is invalid, or fits no nodes of the site.
    """
    run = load_run(request, site)
    size = size_cluster(run, site)
    manifests: list[Manifest] = []
    if run.config_text:
        metadata = {"name": f"{request.name}-config", "namespace": site.namespace, "labels": _labels(run)}
        manifests.append(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"config.yaml": run.config_text}}
        )
    protected = ["head", *(group.name for group in size.groups if group.name in ("learner", "serve"))]
    return [*manifests, _workload(run, size, site), *(_budget(run, name, site) for name in protected)]


def to_yaml(manifests: Sequence[Manifest], comment: str = "") -> str:
    """Return a YAML stream for `kubectl apply -f`, after a comment."""
    header = "".join(f"# {line}\n" for line in comment.splitlines())
    dumped = yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=118)
    return header + dumped


class _Dumper(yaml.SafeDumper):
    """Writes no aliases, and long or multi-line texts as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else ">" if len(text) > 100 and "  " not in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _labels(run: RunSpec) -> dict[str, str]:
    labels = pod_labels(run, "")
    del labels["vz-ray/group"]
    return labels


def _workload(run: RunSpec, size: ClusterSize, site: SiteConfig) -> Manifest:
    kind, specs = {
        "job": ("RayJob", _job),
        "cluster": ("RayCluster", _cluster_alone),
        "service": ("RayService", _service),
    }[run.request.kind]
    labels, annotations = {**_labels(run), **site.labels}, {}
    if run.request.kind != "service":
        annotations[STOP_REASON] = f"{size.stop_s} s: {size.stop_reason}"
    else:
        annotations["ray.io/initializing-timeout"] = f"{site.nodes_timeout_s}s"
    if run.request.queue:
        labels["kueue.x-k8s.io/queue-name"] = run.request.queue
        if size.elastic:
            annotations["kueue.x-k8s.io/elastic-job"] = "true"
    metadata: Manifest = {"name": run.request.name, "namespace": site.namespace, "labels": labels}
    if annotations:
        metadata["annotations"] = annotations
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": metadata, "spec": specs(run, size, site)}


def _job(run: RunSpec, size: ClusterSize, site: SiteConfig) -> Manifest:
    """A run with a cluster of its own. A new cluster after a failure resumes the run, because the name is the same."""
    spec: Manifest = {"suspend": True} if run.request.queue else {}
    return spec | {
        "entrypoint": entrypoint(run),
        "entrypointResources": json.dumps({"head": NODE_GROUP_AMOUNT}),
        "submissionMode": "K8sJobMode",
        "submitterConfig": {"backoffLimit": SUBMIT_RETRIES},
        "backoffLimit": MAX_RETRIES,
        "preRunningDeadlineSeconds": site.nodes_timeout_s,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": FINISHED_TTL_S,
        "submitterPodTemplate": _submitter(run, site),
        "rayClusterSpec": _cluster(run, size, site),
    }


def entrypoint(run: RunSpec) -> str:
    """Return the command line of the driver."""
    return shlex.join(["vz-ray", run.command, run.file, *run.overrides])


def _cluster_alone(run: RunSpec, size: ClusterSize, site: SiteConfig) -> Manifest:
    return ({"suspend": True} if run.request.queue else {}) | _cluster(run, size, site)


def _service(run: RunSpec, size: ClusterSize, site: SiteConfig) -> Manifest:
    config = run.config
    assert isinstance(config, ServeConfig)
    return {
        "excludeHeadPodFromServeSvc": True,
        "rayClusterDeletionDelaySeconds": int(config.timeouts.drain_s) + STOP_MARGIN_S,
        "upgradeStrategy": {"type": "NewCluster"},
        "serveConfigV2": serve_config(run),
        "rayClusterConfig": _cluster(run, size, site),
    }


def serve_config(run: RunSpec) -> str:
    """Return Ray Serve's config. Weights are in `user_config` only: a change of `args` restarts the replicas."""
    arguments: dict[str, Any] = {"config": run.file}
    for override in run.overrides:
        key, _, value = override.partition("=")
        if key != "model":
            arguments[key] = yaml.safe_load(value)
    application = {
        "name": "vz_ray",
        "route_prefix": "/",
        "import_path": "vz_ray.serve.app:build",
        "args": arguments,
        "deployments": [{"name": "Agent", "user_config": {"model": run.config.model, "version": 1}}],
    }
    options = {"proxy_location": "EveryNode", "http_options": {"host": "0.0.0.0", "port": 8000}}
    return yaml.safe_dump({**options, "applications": [application]}, sort_keys=False)


def _submitter(run: RunSpec, site: SiteConfig) -> Manifest:
    """Pod that submits the job and follows its log; it can be evicted and never submits twice."""
    amounts = {"cpu": "200m", "memory": "1Gi", "ephemeral-storage": "1Gi"}
    container = {
        "name": "submitter",
        "image": site.image,
        "env": [{"name": "HOME", "value": "/tmp"}, {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}],
        "resources": {"requests": amounts, "limits": {**amounts, "cpu": "1"}},
        "securityContext": LOCKED,
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    spec: Manifest = {
        "restartPolicy": "Never",
        "serviceAccountName": "vz-ray-worker",
        "automountServiceAccountToken": False,
        "securityContext": USER,
        "containers": [container],
        "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}],
    }
    if site.pull_secret:
        spec["imagePullSecrets"] = [{"name": site.pull_secret}]
    return {"metadata": {"labels": pod_labels(run, "submitter")}, "spec": spec}


def _cluster(run: RunSpec, size: ClusterSize, site: SiteConfig) -> Manifest:
    """Head and worker groups. Without an elastic group there is no autoscaler: KubeRay replaces lost pods itself."""
    spec: Manifest = {"rayVersion": version("ray"), "authOptions": AUTH}
    if size.elastic:
        spec |= {"enableInTreeAutoscaling": True, "autoscalerOptions": _autoscaler()}
    head = {
        # Only drivers run here: 0 CPUs, and a resource that drivers request.
        "resources": {"CPU": "0", "head": "1"},
        "rayStartParams": _start_params(size.head),
        "template": pod_template(run, size, size.head, site),
    }
    return spec | {
        "headGroupSpec": head,
        "workerGroupSpecs": [_worker_group(run, size, group, site) for group in size.groups],
    }


def _worker_group(run: RunSpec, size: ClusterSize, group: PodGroup, site: SiteConfig) -> Manifest:
    spec: Manifest = {
        "groupName": group.name,
        "replicas": group.min_pods,
        "minReplicas": group.min_pods,
        "maxReplicas": group.max_pods,
    }
    if size.elastic and group.elastic:
        spec["idleTimeoutSeconds"] = IDLE_S
    if group.spot:
        spec["labels"] = SPOT_MARKET
    return spec | {
        "resources": {group.name: "1"},
        "rayStartParams": _start_params(group),
        "template": pod_template(run, size, group, site),
    }


def _start_params(group: PodGroup) -> dict[str, str]:
    return {
        "object-store-memory": str(int(group.object_store_gib * 2**30)),
        "object-spilling-directory": f"{SCRATCH}/spill",
    }


def _autoscaler() -> Manifest:
    """Version 2 drains nodes before deletion and has an idle timeout per group."""
    amounts = {"cpu": "200m", "memory": "1Gi", "ephemeral-storage": "1Gi"}
    return {
        "version": "v2",
        "upscalingMode": "Default",
        "idleTimeoutSeconds": IDLE_S,
        "imagePullPolicy": "IfNotPresent",
        "env": [{"name": "HOME", "value": "/tmp"}],
        "resources": {"requests": amounts, "limits": {**amounts, "cpu": "1"}},
        "securityContext": LOCKED,
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }


def _budget(run: RunSpec, group: str, site: SiteConfig) -> Manifest:
    """Disruption budget: a node drain waits for these pods."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": f"{run.request.name}-{group}", "namespace": site.namespace, "labels": _labels(run)},
        "spec": {"minAvailable": 1, "selector": {"matchLabels": pod_labels(run, group)}},
    }
