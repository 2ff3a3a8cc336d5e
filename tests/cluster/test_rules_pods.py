"""Rules of pods: what a pod asks for, mounts and may do."""

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
    disk,
    env,
    group,
    main,
    only,
    pod,
    resources,
    rules_of,
    workload,
)

GPUS = {"nvidia.com/gpu": "4"}

CASES: list[Case] = [
    (
        "gpus-are-whole",
        PAPER,
        lambda m: main(m, LEARNER)["resources"]["requests"].update(GPUS),
        "RayJob vz-ray-rl, learner: nvidia.com/gpu is 4 in requests and 8 in limits",
    ),
    (
        "shared-memory-is-sized",
        PAPER,
        lambda m: next(v for v in main(m, ROLLOUT)["volumeMounts"] if v["mountPath"] == "/dev/shm").update(
            mountPath="/shm"
        ),
        "no emptyDir of medium Memory",
    ),
    (
        "shared-memory-is-sized",
        PAPER,
        lambda m: disk(m, ROLLOUT, "shared-memory")["emptyDir"].pop("sizeLimit"),
        "has no sizeLimit",
    ),
    (
        "shared-memory-is-sized",
        PAPER,
        lambda m: disk(m, ROLLOUT, "shared-memory")["emptyDir"].update(sizeLimit="200Gi"),
        "/dev/shm may have 200Gi, and the container 128 GiB",
    ),
    (
        "shared-memory-is-sized",
        SERVE,
        lambda m: group(m, 0)["rayStartParams"].update({"object-store-memory": str(2**36)}),
        "object-store-memory is 64 GiB and /dev/shm 24Gi",
    ),
    (
        "disks-are-asked-for",
        PAPER,
        lambda m: resources(m, CLIPS, "limits", ephemeral_storage="50Gi"),
        "limits.ephemeral-storage is 50 GiB and its emptyDirs hold 270",
    ),
    (
        "disks-are-asked-for",
        PAPER,
        lambda m: disk(m, LEARNER, "tmp")["emptyDir"].pop("sizeLimit"),
        "emptyDir tmp has no sizeLimit",
    ),
    ("probes-are-set", SERVE, lambda m: main(m, 0).pop("livenessProbe"), "livenessProbe is not set"),
    (
        "pods-are-not-root",
        PAPER,
        lambda m: pod(m, HEAD)["securityContext"].update(runAsUser=0),
        "runAsNonRoot True and runAsUser 0",
    ),
    (
        "pods-are-not-root",
        PAPER,
        lambda m: pod(m, HEAD)["securityContext"].pop("seccompProfile"),
        "seccompProfile.type is None",
    ),
    ("pods-are-not-root", PAPER, lambda m: pod(m, LEARNER).update(hostNetwork=True), "it uses hostNetwork"),
    (
        "containers-are-locked",
        PAPER,
        lambda m: main(m, LEARNER)["securityContext"].update(allowPrivilegeEscalation=True),
        "lacks allowPrivilegeEscalation: false",
    ),
    (
        "containers-are-locked",
        PAPER,
        lambda m: cluster(m)["autoscalerOptions"].pop("securityContext"),
        "autoscalerOptions: securityContext lacks",
    ),
    (
        "containers-are-locked",
        PAPER,
        lambda m: workload(m)["spec"]["submitterPodTemplate"]["spec"]["containers"][0][
            "securityContext"
        ].update(capabilities={}),
        "submitter, container submitter: securityContext lacks capabilities.drop",
    ),
    (
        "written-paths-are-mounted",
        PAPER,
        lambda m: env(m, CLIPS, "HOME", value="/home/ray"),
        "/home/ray is not on a volume",
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
    assert {case[0] for case in CASES} == rules_of("pods")
    assert all(RULES[case[0]].__doc__ for case in CASES)
