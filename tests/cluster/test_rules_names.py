"""Rules of names: what is named exists."""

from __future__ import annotations

import pytest

from cluster.manifests.rules import RULES
from tests.cluster.rule_cases import (
    CLIPS,
    HEAD,
    LEARNER,
    PAPER,
    ROLLOUT,
    SERVE,
    Case,
    cluster,
    env,
    main,
    named,
    only,
    pod,
    rules_of,
    without,
)

MONITOR = {
    "kind": "PodMonitor",
    "metadata": {"name": "other"},
    "spec": {"selector": {}, "podMetricsEndpoints": [{"port": "metric"}]},
}
OPEN = {"from": [{"namespaceSelector": {}}], "ports": [{"port": 8265}]}

CASES: list[Case] = [
    (
        "mounts-name-volumes",
        PAPER,
        lambda m: main(m, LEARNER)["volumeMounts"].append({"name": "data", "mountPath": "/data"}),
        "volumeMounts names data, and the pod has runs",
    ),
    (
        "mounts-name-volumes",
        PAPER,
        lambda m: pod(m, LEARNER)["volumes"].append(
            {"name": "data", "persistentVolumeClaim": {"claimName": "vz-ray-runs"}}
        ),
        "the volume data is mounted nowhere",
    ),
    (
        "references-exist",
        PAPER,
        lambda m: without(m, "PersistentVolumeClaim", "vz-ray-models"),
        "PersistentVolumeClaim vz-ray-models is in no manifest",
    ),
    (
        "references-exist",
        PAPER,
        lambda m: pod(m, ROLLOUT).update(serviceAccountName="vz-ray"),
        "ServiceAccount vz-ray is in no manifest",
    ),
    (
        "references-exist",
        SERVE,
        lambda m: env(m, 0, "HF_TOKEN", valueFrom={"secretKeyRef": {"name": "vz-ray-hubs", "key": "token"}}),
        "Secret vz-ray-hubs is in no manifest and not in k8s/required.yaml",
    ),
    (
        "references-exist",
        SERVE,
        lambda m: env(
            m,
            0,
            "HF_TOKEN",
            valueFrom={"secretKeyRef": {"name": "vz-ray-hub", "key": "key", "optional": True}},
        ),
        "Secret vz-ray-hub has no key key",
    ),
    (
        "references-exist",
        PAPER,
        lambda m: cluster(m)["authOptions"].update(secretName="token"),
        "authOptions.secretName is token, which is not in k8s/required.yaml",
    ),
    (
        "references-exist",
        PAPER,
        lambda m: env(m, CLIPS, "A", valueFrom={"configMapKeyRef": {"name": "a", "key": "b"}}),
        "ConfigMap a is in no manifest",
    ),
    (
        "optional-secrets-may-be-missing",
        SERVE,
        lambda m: env(m, 0, "HF_TOKEN", valueFrom={"secretKeyRef": {"name": "vz-ray-hub", "key": "token"}}),
        "env HF_TOKEN takes vz-ray-hub with optional false, and k8s/required.yaml says true",
    ),
    (
        "optional-secrets-may-be-missing",
        SERVE,
        lambda m: next(one for one in main(m, HEAD)["env"] if one["name"] == "VZ_RAY_KEYS")["valueFrom"][
            "secretKeyRef"
        ].update(optional=True),
        "env VZ_RAY_KEYS takes vz-ray-keys with optional true, and k8s/required.yaml says false",
    ),
    (
        "secrets-have-no-values",
        PAPER,
        lambda m: env(m, LEARNER, "HF_TOKEN", value="x"),
        "env HF_TOKEN has a value; take it from a secret",
    ),
    (
        "secrets-have-no-values",
        PAPER,
        lambda m: m.append({"kind": "Secret", "metadata": {"name": "a"}, "stringData": {"b": "c"}}),
        "Secret a: it has values",
    ),
    (
        "budgets-hold-pods",
        PAPER,
        lambda m: without(m, "PodDisruptionBudget", "vz-ray-rl-learner"),
        "learner: no PodDisruptionBudget holds it",
    ),
    (
        "budgets-hold-pods",
        PAPER,
        lambda m: named(m, "PodDisruptionBudget", "vz-ray-rl-learner")["spec"].update(minAvailable=2),
        "minAvailable is 2 of 1 pods",
    ),
    (
        "budgets-hold-pods",
        SERVE,
        lambda m: named(m, "PodDisruptionBudget", "vz-ray-serve-serve")["spec"]["selector"].update(
            matchLabels={"vz-ray/workload": "served"}
        ),
        "no pod has the labels {'vz-ray/workload': 'served'}",
    ),
    (
        "private-ports-are-closed",
        PAPER,
        lambda m: without(m, "NetworkPolicy", "vz-ray-private"),
        "no NetworkPolicy selects all pods for Ingress",
    ),
    (
        "private-ports-are-closed",
        SERVE,
        lambda m: named(m, "NetworkPolicy", "vz-ray-serving")["spec"]["ingress"].append(OPEN),
        "vz-ray-serving, ingress[1]: it opens dashboard and job API beyond the namespace",
    ),
    (
        "private-ports-are-closed",
        SERVE,
        lambda m: named(m, "NetworkPolicy", "vz-ray-serving")["spec"].update(ingress=[{}]),
        "it opens GCS, dashboard and job API, Ray clients beyond the namespace",
    ),
    (
        "metrics-have-a-port",
        PAPER,
        lambda m: main(m, CLIPS)["ports"][0].update(containerPort=8081),
        "port metrics is 8081; set containerPort 8080",
    ),
    (
        "monitors-find-ports",
        PAPER,
        lambda m: m.append(MONITOR),
        "PodMonitor other: no pod has a port metric;",
    ),
]


@pytest.mark.parametrize(
    ("rule", "name", "mutate", "words"), CASES, ids=[f"{n}-{case[0]}" for n, case in enumerate(CASES)]
)
def test_a_broken_manifest_is_caught_by_its_rule_and_no_other(overlay, rule, name, mutate, words):
    manifests = overlay(name)
    mutate(manifests)
    only(rule, manifests, words)


def test_every_rule_has_a_case_and_says_what_it_is_about():
    assert {case[0] for case in CASES} == rules_of("names")
    assert all(RULES[case[0]].__doc__ for case in CASES)
