"""What is named exists: volumes, claims, secrets, pods of a budget, ports."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml

from cluster.manifests.objects import Bundle, Pod
from cluster.manifests.rules.registry import rule
from cluster.manifests.schema import ROOT

REQUIRED = ROOT / "k8s" / "required.yaml"
PRIVATE = {6379: "GCS", 8265: "dashboard and job API", 10001: "Ray clients"}
METRICS = 8080


@cache
def required() -> dict[str, Any]:
    """What users make themselves: k8s/required.yaml."""
    return dict(yaml.safe_load(REQUIRED.read_text()))


@rule
def mounts_name_volumes(bundle: Bundle) -> Iterator[str]:
    """Each mount is of a volume of its pod, and each volume is mounted."""
    for pod in bundle.pods:
        mounted = {str(m.get("name")) for c in pod.containers for m in c.get("volumeMounts") or []}
        for name in sorted(mounted - set(pod.volumes)):
            yield (
                f"{pod.label}: volumeMounts names {name}, and the pod has {', '.join(pod.volumes)}; add the "
                "volume"
            )
        for name in sorted(set(pod.volumes) - mounted):
            yield f"{pod.label}: the volume {name} is mounted nowhere; mount or remove it"


@rule
def references_exist(bundle: Bundle) -> Iterator[str]:
    """Claims, accounts and config maps are among the manifests; secrets too, or are in k8s/required.yaml."""
    for pod in bundle.pods:
        for kind, name, key in _references(pod):
            if name in bundle.names(kind):
                continue
            known = required()["secrets"].get(name) if kind == "Secret" else None
            if known is None:
                yield (
                    f"{pod.label}: {kind} {name} is in no manifest"
                    + (" and not in k8s/required.yaml" if kind == "Secret" else "")
                    + "; correct the name or add it"
                )
            elif key and key not in known["keys"]:
                yield (
                    f"{pod.label}: Secret {name} has no key {key}; k8s/required.yaml has "
                    f"{', '.join(known['keys'])}"
                )
    for workload in bundle.workloads:
        token = (workload.cluster.get("authOptions") or {}).get("secretName")
        if token and token not in required()["secrets"] and token not in bundle.names("Secret"):
            yield (
                f"{workload.label}: authOptions.secretName is {token}, which is not in k8s/required.yaml; "
                "add it there"
            )


def _references(pod: Pod) -> Iterator[tuple[str, str, str]]:
    """Kind, name and key of everything that a pod takes from elsewhere."""
    if account := pod.spec.get("serviceAccountName"):
        yield "ServiceAccount", account, ""
    for pull in pod.spec.get("imagePullSecrets") or []:
        yield "Secret", pull["name"], ""
    for volume in pod.volumes.values():
        if claim := volume.get("persistentVolumeClaim"):
            yield "PersistentVolumeClaim", claim["claimName"], ""
        if secret := volume.get("secret"):
            yield "Secret", secret["secretName"], ""
        if config := volume.get("configMap"):
            yield "ConfigMap", config["name"], ""
    for container in pod.containers:
        for entry in container.get("env") or []:
            source = entry.get("valueFrom") or {}
            for field, kind in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
                if field in source:
                    yield kind, source[field]["name"], source[field]["key"]
        for source in container.get("envFrom") or []:
            for field, kind in (("secretRef", "Secret"), ("configMapRef", "ConfigMap")):
                if field in source:
                    yield kind, source[field]["name"], ""


@rule
def optional_secrets_may_be_missing(bundle: Bundle) -> Iterator[str]:
    """What k8s/required.yaml calls optional, pods start without; what it does not, they wait for."""
    for pod in bundle.pods:
        for name, entry in pod.env().items():
            source = (entry.get("valueFrom") or {}).get("secretKeyRef") or {}
            known = required()["secrets"].get(source.get("name"))
            if known and known["optional"] != bool(source.get("optional")):
                yield (
                    f"{pod.label}: env {name} takes {source['name']} with optional "
                    f"{str(bool(source.get('optional'))).lower()}, and k8s/required.yaml says "
                    f"{str(known['optional']).lower()}; make them equal"
                )


@rule
def secrets_have_no_values(bundle: Bundle) -> Iterator[str]:
    """No manifest holds a secret's value."""
    for secret in bundle.of("Secret"):
        if secret.get("data") or secret.get("stringData"):
            yield (
                f"Secret {secret['metadata']['name']}: it has values; make it with kubectl, and keep it out "
                "of files"
            )
    for pod in bundle.pods:
        for name, entry in pod.env().items():
            if name.endswith(("_KEY", "_TOKEN", "_PASSWORD", "_SECRET", "_KEYS")) and "value" in entry:
                yield (
                    f"{pod.label}: env {name} has a value; take it from a secret with valueFrom.secretKeyRef"
                )


@rule
def budgets_hold_pods(bundle: Bundle) -> Iterator[str]:
    """Each disruption budget selects pods that there are, and head and learner have one."""
    budgets = [(b["metadata"]["name"], b.get("spec") or {}) for b in bundle.of("PodDisruptionBudget")]
    for name, spec in budgets:
        labels = (spec.get("selector") or {}).get("matchLabels") or {}
        held = [group for group in bundle.groups if labels and labels.items() <= group.labels.items()]
        fewest = sum(group.replicas()[0] for group in held)
        if not held:
            yield (
                f"PodDisruptionBudget {name}: no pod has the labels {labels}; select vz-ray/workload and "
                "vz-ray/group"
            )
        elif not isinstance(spec.get("minAvailable"), int) or not 1 <= spec["minAvailable"] <= fewest:
            yield (
                f"PodDisruptionBudget {name}: minAvailable is {spec.get('minAvailable')} of {fewest} pods; "
                "it must be a "
                "number from 1 to that (KubeRay's pods cannot be counted in percent or by maxUnavailable)"
            )
    for workload in bundle.workloads:
        for group in workload.groups:
            selected = any(
                ((spec.get("selector") or {}).get("matchLabels") or {"": ""}).items() <= group.labels.items()
                for _, spec in budgets
            )
            if group.name in ("head", "learner") and not selected:
                yield (
                    f"{group.label}: no PodDisruptionBudget holds it, so draining its machine ends the run; "
                    "add one"
                )


@rule
def private_ports_are_closed(bundle: Bundle) -> Iterator[str]:
    """Ray's own ports are for pods of the namespace, and the dashboard's for KubeRay's operator besides."""
    if not bundle.workloads:
        return
    policies = [(p["metadata"]["name"], p.get("spec") or {}) for p in bundle.of("NetworkPolicy")]
    if not any(
        spec.get("podSelector") == {} and "Ingress" in (spec.get("policyTypes") or []) for _, spec in policies
    ):
        yield "no NetworkPolicy selects all pods for Ingress, so every port is open; add k8s/base/common"
    for name, spec in policies:
        for number, opening in enumerate(spec.get("ingress") or []):
            peers = opening.get("from") or [{}]
            ports = {p.get("port") for p in opening.get("ports") or []}
            opened = [what for port, what in PRIVATE.items() if not ports or port in ports]
            inside = all(set(peer) == {"podSelector"} for peer in peers)
            operator = ports <= {8265, 8000} and all(
                ((peer.get("podSelector") or {}).get("matchLabels") or {}).get("app.kubernetes.io/name")
                == "kuberay-operator"
                for peer in peers
            )
            if opened and not inside and not operator:
                yield (
                    f"NetworkPolicy {name}, ingress[{number}]: it opens {', '.join(opened)} beyond the "
                    "namespace; "
                    "name ports that are not Ray's, or take only a podSelector"
                )


@rule
def metrics_have_a_port(bundle: Bundle) -> Iterator[str]:
    """Each of Ray's containers names the port that Prometheus reads."""
    for group in bundle.groups:
        ports = {port.get("name"): port.get("containerPort") for port in group.main.get("ports") or []}
        if ports.get("metrics") != METRICS:
            yield (
                f"{group.label}: port metrics is {ports.get('metrics')}; set containerPort {METRICS}, Ray's "
                "default"
            )


@rule
def monitors_find_ports(bundle: Bundle) -> Iterator[str]:
    """Each endpoint of a PodMonitor is a port of some pod."""
    known = {port.get("name") for group in bundle.groups for port in group.main.get("ports") or []}
    for monitor in bundle.of("PodMonitor"):
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            if endpoint["port"] not in known:
                yield (
                    f"PodMonitor {monitor['metadata']['name']}: no pod has a port {endpoint['port']}; "
                    f"there are {', '.join(sorted(map(str, known)))}"
                )
