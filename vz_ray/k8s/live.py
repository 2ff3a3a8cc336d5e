"""Comparison of manifests with a cluster through kubectl: missing parts, and what an apply would change."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vz_ray.k8s.manifest import CLUSTER_FIELD, Manifest, Workload, workload_of
from vz_ray.k8s.rules import REQUIRED_SECRETS, SECRET_KEYS, secret_references
from vz_ray.utils.errors import UserError

REQUEST_TIMEOUT_S = 30.0
KUBERAY = "KubeRay 1.7 or newer"
_MISSING = object()


@dataclass(frozen=True, slots=True)
class Kubectl:
    """Reads objects of a cluster.

    Attributes:
        context: Context of the kubeconfig; empty: the current one.
    """

    context: str = ""

    def get(self, kind: str, name: str, namespace: str = "") -> Manifest | None:
        """Return an object; None if it does not exist.

        Raises:
            UserError: kubectl is missing, or the cluster does not answer or refuses.
        """
        search_path = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{Path(sys.executable).parent}"
        program = shutil.which("kubectl", path=search_path)
        if program is None:
            raise UserError(
                "kubectl is not installed: https://kubernetes.io/docs/tasks/tools, or run without a cluster"
            )
        command = [program, "get", kind, name, "--ignore-not-found", "--output=json"]
        command += [f"--namespace={namespace}"] if namespace else []
        command += [f"--context={self.context}"] if self.context else []
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=REQUEST_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            message = f"kubectl get {kind} {name} had no answer for {REQUEST_TIMEOUT_S:g} s"
            raise UserError(f"{message}; check the cluster's address, or --context") from error
        if result.returncode:
            lines = result.stderr.strip().splitlines() or [f"status {result.returncode}"]
            if "the server doesn't have a resource type" in lines[-1]:
                return None
            raise UserError(f"kubectl get {kind} {name} failed: {lines[-1]}; check --context and your access")
        return json.loads(result.stdout) if result.stdout.strip() else None


def find_missing(manifests: Sequence[Manifest], kubectl: Kubectl) -> list[str]:
    """Return one line for each part of the cluster that a run lacks, and for a run of the same name.

    Raises:
        UserError: See `Kubectl.get`.
    """
    workload = workload_of(manifests)
    problems = list(_check_crd(workload, kubectl))
    if problems:
        return problems
    namespace = str(workload.manifest["metadata"].get("namespace", "default"))
    if kubectl.get("namespace", namespace) is None:
        return [f"namespace {namespace} does not exist: kubectl apply -k k8s/site"]
    for check in (_check_same_name, _check_claims, _check_secrets):
        problems += check(workload, namespace, kubectl)
    return problems


def _check_crd(workload: Workload, kubectl: Kubectl) -> Iterator[str]:
    name = f"{workload.kind.lower()}s.ray.io"
    crd = kubectl.get("crd", name)
    if crd is None:
        yield f"the cluster has no {name}: install {KUBERAY}"
        return
    versions = {version["name"]: version for version in crd["spec"]["versions"]}
    if "v1" not in versions:
        yield f"{name} has no version v1: update to {KUBERAY}, CRDs first"
        return
    schema = versions["v1"]["schema"]["openAPIV3Schema"]
    for field in unknown_fields(schema, workload.manifest):
        yield f"{name} of this cluster has no field {field}: update to {KUBERAY}, CRDs first"


def unknown_fields(schema: Manifest, value: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of fields that a structural schema does not have; the API server drops them silently."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    if isinstance(value, list):
        for item in value:
            yield from unknown_fields(schema.get("items", {}), item, path)
    elif isinstance(value, dict):
        properties, other = schema.get("properties"), schema.get("additionalProperties")
        for name, child in value.items():
            child_path = f"{path}.{name}".removeprefix(".")
            if properties is not None and name in properties:
                yield from unknown_fields(properties[name], child, child_path)
            elif isinstance(other, dict):
                yield from unknown_fields(other, child, child_path)
            elif properties is not None and child_path not in ("apiVersion", "kind", "metadata"):
                yield child_path


def _check_same_name(workload: Workload, namespace: str, kubectl: Kubectl) -> Iterator[str]:
    """A workload keeps its name when it resumes; another run must not take it."""
    live = kubectl.get(workload.kind, workload.name, namespace)
    if live is None:
        return
    if workload.kind == "RayJob":
        entrypoint, running = workload.spec["entrypoint"], live["spec"].get("entrypoint")
        same = entrypoint == running
        status = live.get("status", {}).get("jobDeploymentStatus", "unknown")
        wrong = "is already there" if same else "is already there with another entrypoint"
        yield (
            f"RayJob {workload.name} {wrong} (status {status}), and apply would not restart it: use another --name, or "
            f"to resume the run: kubectl -n {namespace} delete rayjob {workload.name}"
        )
    elif (live["metadata"].get("labels") or {}).get("vz-ray/run") != workload.name:
        yield f"{workload.kind} {workload.name} is already there and not from `vz-ray k8s render`: use another --name"


def _check_claims(workload: Workload, namespace: str, kubectl: Kubectl) -> Iterator[str]:
    claims = {
        v["persistentVolumeClaim"]["claimName"]: v["name"]
        for pod in workload.pods
        for v in pod["volumes"]
        if "persistentVolumeClaim" in v
    }
    for claim, volume in claims.items():
        live = kubectl.get("persistentvolumeclaim", claim, namespace)
        if live is None:
            yield f"claim {claim} does not exist: kubectl apply -k k8s/site, or name yours in the site file"
            continue
        modes = live["spec"].get("accessModes", [])
        if volume != "videos" and not any(mode.startswith("ReadWrite") for mode in modes):
            yield f"claim {claim} is {' and '.join(modes)}, and pods write to /{volume}: use ReadWriteMany"
        one_machine = (live["metadata"].get("annotations") or {}).get("vz-ray/one-machine") == "true"
        if "ReadWriteOnce" in modes and "ReadWriteMany" not in modes and not one_machine:
            yield f"claim {claim} is ReadWriteOnce, so that pods of one node only can mount it: use ReadWriteMany"


def _check_secrets(workload: Workload, namespace: str, kubectl: Kubectl) -> Iterator[str]:
    names = {"vz-ray-auth", *(name for name, _, _ in secret_references(workload) if name in REQUIRED_SECRETS)}
    for name in sorted(names):
        live = kubectl.get("secret", name, namespace)
        for key in SECRET_KEYS[name]:
            if key not in ((live or {}).get("data") or {}):
                yield f"secret {name} with key {key} does not exist: docs/kubernetes.md shows how to create it"


def find_changes(manifests: Sequence[Manifest], kubectl: Kubectl) -> list[str]:
    """Return what an apply would change, one line per field, and its effect; empty if nothing.

    Fields that only the cluster has are defaults, and not reported.

    Raises:
        UserError: See `Kubectl.get`.
    """
    lines: list[str] = []
    for manifest in manifests:
        kind, metadata = manifest["kind"], manifest["metadata"]
        live = kubectl.get(kind, metadata["name"], metadata.get("namespace", ""))
        if live is None:
            lines.append(f"{kind} {metadata['name']}: new")
            continue
        changes = [c for part in ("spec", "data") for c in _changes(part, live.get(part), manifest.get(part, _MISSING))]
        lines += [f"{kind} {metadata['name']}: {path}: {_short(old)} -> {_short(new)}" for path, old, new in changes]
        if changes and kind in CLUSTER_FIELD:
            effects = {effect_of(kind, path) for path, _, _ in changes}
            lines += [f"{kind} {metadata['name']}: {effect}" for effect in sorted(effects)]
    return lines


def effect_of(kind: str, path: str) -> str:
    """Return what KubeRay does with a changed field."""
    if path == "spec.suspend":
        return "suspend stops or starts the pods"
    if kind == "RayJob":
        return "a running job keeps its cluster; delete it and apply again, the run resumes"
    if path.rpartition(".")[2] in ("replicas", "minReplicas", "maxReplicas"):
        return "the number of pods changes in place"
    if kind == "RayCluster":
        return "running pods stay as they are; only new pods change"
    if ".user_config" in path:
        return "engines load the new weights in place"
    if path.startswith("spec.serveConfigV2"):
        return "Ray Serve restarts every replica"
    return "KubeRay starts a second cluster, which needs as many GPUs again"


def _changes(path: str, live: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield path, old and new value of each field of `new` that differs."""
    if new is _MISSING:
        return
    if path == "spec.serveConfigV2" and isinstance(live, str):
        live, new = yaml.safe_load(live), yaml.safe_load(new)
    if isinstance(new, dict) and isinstance(live, dict):
        for name, value in new.items():
            yield from _changes(f"{path}.{name}", live.get(name), value)
        if path.endswith((".args", ".user_config")):
            yield from ((f"{path}.{name}", live[name], None) for name in live.keys() - new.keys())
    elif isinstance(new, list) and isinstance(live, list):
        old_items, new_items = _by_name(live), _by_name(new)
        for key in dict.fromkeys([*old_items, *new_items]):
            yield from _changes(f"{path}[{key}]", old_items.get(key), new_items.get(key))
    elif live != new:
        yield path, live, new


def _by_name(items: list[Any]) -> dict[str, Any]:
    """Index the items of a list by their name, or by position."""
    names = [
        str(item.get("name") or item.get("groupName") or index) if isinstance(item, dict) else str(index)
        for index, item in enumerate(items)
    ]
    keys = names if len(set(names)) == len(names) else map(str, range(len(items)))
    return dict(zip(keys, items, strict=True))


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value) if isinstance(value, dict | list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
