"""Schemas: what they must catch, and that KubeRay's defaults are filled in first."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from cluster.manifests.check import check
from cluster.manifests.schema import schema_errors, schemas_folder, with_defaults

needs_crds = pytest.mark.skipif(
    schemas_folder() is None, reason="KubeRay's schemas are not here (VZ_RAY_CRDS names their folder)"
)


def one(manifests, kind: str, name: str = "") -> dict[str, Any]:
    return next(m for m in manifests if m["kind"] == kind and name in m["metadata"]["name"])


def learner(job) -> dict[str, Any]:
    return job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]


def container(job) -> dict[str, Any]:
    return learner(job)["template"]["spec"]["containers"][0]


CUSTOM: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "typo in a field of the job": (
        lambda job: job["spec"].update(backofLimit=3),
        "'backofLimit' was unexpected",
    ),
    "typo deep in a pod": (
        lambda job: container(job).update(volumeMount=container(job).pop("volumeMounts")),
        "'volumeMount' was unexpected",
    ),
    "typo at the top": (lambda job: job.update(specs={}), "'specs' was unexpected"),
    "typo in the metadata": (
        lambda job: job["metadata"].update(label={}),
        "metadata: .*'label' was unexpected",
    ),
    "a number as text": (lambda job: learner(job).update(replicas="8"), "'8' is not of type 'integer'"),
    "text as a number": (lambda job: container(job)["env"][0].update(value=1), "1 is not of type 'string'"),
    "a map where a list belongs": (
        lambda job: container(job).update(env={"A": "1"}),
        "is not of type 'array'",
    ),
    "a value that is none of those": (
        lambda job: job["spec"]["rayClusterSpec"]["autoscalerOptions"].update(version="v3"),
        "'v3' is not one of",
    ),
    "a required field that is gone": (
        lambda job: learner(job).pop("groupName"),
        "'groupName' is a required property",
    ),
    "no quantity": (
        lambda job: container(job)["resources"]["limits"].update(memory="lots"),
        "'lots' (is not valid|does not match)",
    ),
    "a name that KubeRay must cut": (lambda job: job["metadata"].update(name="a" * 48), "is too long"),
    "another version of the API": (lambda job: job.update(apiVersion="ray.io/v2"), "no RayJob in ray.io/v2"),
}


@needs_crds
@pytest.mark.parametrize("what", CUSTOM)
def test_kuberays_schema_catches(overlay, what):
    job = one(overlay("16gpu-paper"), "RayJob")
    assert not list(schema_errors(job))
    mutate, words = CUSTOM[what]
    mutate(job)
    found = list(schema_errors(job))
    assert any(re.search(words, fault) for fault in found), found


CORE: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "typo in a claim": ("PersistentVolumeClaim", lambda m: m["spec"].update(accessMode=[])),
    "wrong type in a budget": ("PodDisruptionBudget", lambda m: m["spec"].update(minAvailable=[1])),
    "typo in a policy": ("NetworkPolicy", lambda m: m["spec"].update(podselector={})),
    "a policy's port as a map": (
        "NetworkPolicy",
        lambda m: m["spec"].update(ingress=[{"ports": {"port": 1}}]),
    ),
    "a kind that is not there": ("Namespace", lambda m: m.update(kind="Namespaces")),
    "typo in an account": ("ServiceAccount", lambda m: m.update(automountServiceAccountTokens=True)),
}


@pytest.mark.parametrize("what", CORE)
def test_kubernetes_own_schemas_catch(overlay, what):
    kind, mutate = CORE[what]
    manifest = one(overlay("16gpu-paper"), kind)
    assert not list(schema_errors(manifest))
    mutate(manifest)
    assert list(schema_errors(manifest))


def test_a_podmonitor_with_a_typo_is_refused():
    monitor = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": "a"},
        "spec": {"selector": {}, "podMetricsEndpoints": [{"port": "metrics"}]},
    }
    assert not list(schema_errors(monitor))
    monitor["spec"]["podMetricsEndpoints"][0]["intervall"] = "15s"
    assert "intervall" in "".join(schema_errors(monitor))


def test_defaults_are_filled_in_before_and_what_is_said_stays():
    schema = {
        "properties": {
            "a": {"default": 1},
            "b": {"items": {"properties": {"c": {"default": {"d": 2}}, "e": {"default": 3}}}},
        }
    }
    said = {"b": [{"e": 0}, {}]}
    assert with_defaults(schema, said) == {
        "a": 1,
        "b": [{"e": 0, "c": {"d": 2}}, {"e": 3, "c": {"d": 2}}],
    }
    assert said == {"b": [{"e": 0}, {}]}


@needs_crds
def test_a_field_that_kuberay_fills_in_need_not_be_said(overlay):
    job = one(overlay("16gpu-paper"), "RayJob")
    group = learner(job)
    for name in ("replicas", "minReplicas", "maxReplicas"):
        group.pop(name)
    assert not list(schema_errors(job))


@needs_crds
def test_rules_are_not_asked_about_what_has_another_shape(overlay):
    manifests = overlay("16gpu-paper")
    one(manifests, "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"] = {"learner": {}}
    assert {finding.rule for finding in check(manifests)} == {"schema"}
