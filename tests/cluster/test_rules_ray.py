"""Rules of ray: groups, versions, autoscaling, the token."""

from __future__ import annotations

import pytest

from cluster.manifests.rules import RULES
from tests.cluster.rule_cases import (
    CLIPS,
    ELASTIC,
    HEAD,
    LEARNER,
    PAPER,
    ROLLOUT,
    SERVE,
    Case,
    cluster,
    env,
    group,
    main,
    only,
    pod,
    rules_of,
)

SPOT = {"key": "cloud.google.com/gke-spot", "operator": "Exists"}

CASES: list[Case] = [
    (
        "head-takes-no-work",
        PAPER,
        lambda m: group(m, HEAD).update(resources={"head": "1"}),
        "Ray is told of 8 CPU",
    ),
    (
        "replicas-are-in-order",
        ELASTIC,
        lambda m: group(m, ROLLOUT).update(replicas=17),
        "minReplicas, replicas, maxReplicas are 0, 17, 16",
    ),
    ("learner-is-fixed", PAPER, lambda m: group(m, LEARNER).update(maxReplicas=2), "are (1, 1, 2)"),
    (
        "versions-agree",
        PAPER,
        lambda m: cluster(m).update(rayVersion="2.59.0"),
        "rayVersion is 2.59.0, and requirements/cpu.lock has",
    ),
    (
        "versions-agree",
        PAPER,
        lambda m: main(m, CLIPS).update(image="registry.example.org/vz-ray:0.1.0-ray2.59.0-cu130"),
        "nodes must have the same code",
    ),
    (
        "versions-agree",
        SERVE,
        lambda m: [main(m, i).update(image="vz-ray:latest") for i in (HEAD, 0)],
        "the image is vz-ray:latest; its tag must name the Ray in it",
    ),
    (
        "autoscaler-is-the-second",
        PAPER,
        lambda m: [
            cluster(m)["autoscalerOptions"].update(version="v1"),
            [group(m, i).pop("idleTimeoutSeconds") for i in (ROLLOUT, CLIPS)],
        ],
        "autoscalerOptions.version is v1; set v2",
    ),
    (
        "autoscaler-is-the-second",
        "interactive",
        lambda m: [
            cluster(m).update(enableInTreeAutoscaling=False),
            [group(m, i).pop("idleTimeoutSeconds") for i in (ROLLOUT, CLIPS)],
        ],
        "groups may grow and enableInTreeAutoscaling is off",
    ),
    (
        "autoscaler-is-the-second",
        "kueue",
        lambda m: group(m, ROLLOUT).update(idleTimeoutSeconds=5),
        "idleTimeoutSeconds is set without autoscaler v2",
    ),
    (
        "autoscaler-is-the-second",
        PAPER,
        lambda m: pod(m, ROLLOUT).update(restartPolicy="Always"),
        "are KubeRay's to set",
    ),
    (
        "token-is-asked-for",
        PAPER,
        lambda m: cluster(m)["authOptions"].update(mode="disabled"),
        "set mode: token and secretName: vz-ray-auth",
    ),
    (
        "token-is-asked-for",
        SERVE,
        lambda m: cluster(m)["authOptions"].pop("secretName"),
        "each new cluster has another token",
    ),
    (
        "token-is-asked-for",
        PAPER,
        lambda m: env(m, ROLLOUT, "RAY_AUTH_MODE", value="disabled"),
        "env has RAY_AUTH_MODE; remove it",
    ),
    (
        "groups-carry-their-markers",
        PAPER,
        lambda m: group(m, CLIPS).update(resources={"clips": "2"}),
        "Ray is told of 2 clips",
    ),
    (
        "groups-carry-their-markers",
        PAPER,
        lambda m: group(m, CLIPS).update(resources={"clips": "1", "clip": "1"}),
        "nobody asks for clip;",
    ),
    (
        "groups-carry-their-markers",
        "interactive",
        lambda m: group(m, CLIPS).update(groupName="decoders"),
        "there is no group of this name",
    ),
    (
        "groups-carry-their-markers",
        PAPER,
        lambda m: group(m, ROLLOUT)["rayStartParams"].update({"num-cpus": "8"}),
        "rayStartParams has num-cpus beside resources",
    ),
    (
        "spot-is-for-who-may-go",
        PAPER,
        lambda m: pod(m, ROLLOUT)["tolerations"].append(SPOT),
        "says nothing; give it both or neither",
    ),
    (
        "spot-is-for-who-may-go",
        ELASTIC,
        lambda m: pod(m, ROLLOUT).update(tolerations=[]),
        "it tolerates no spot taint, and its label",
    ),
    (
        "spot-is-for-who-may-go",
        PAPER,
        lambda m: pod(m, LEARNER)["tolerations"].append(SPOT),
        "learner: it may land on spot machines, where a run would end",
    ),
    (
        "spot-is-for-who-may-go",
        "single-node-8gpu",
        lambda m: pod(m, LEARNER).update(tolerations=[{"operator": "Exists"}]),
        "it may land on spot machines",
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
    assert {case[0] for case in CASES} == rules_of("ray")
    assert all(RULES[case[0]].__doc__ for case in CASES)
