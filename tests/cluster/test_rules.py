"""Each rule catches what it is for, alone, in manifests that are right but for that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cluster.manifests import Bundle
from cluster.manifests.objects import quantity
from cluster.manifests.rules import RULES

Manifests = list[dict[str, Any]]
HEAD, LEARNER, ROLLOUT, CLIPS = -1, 0, 1, 2


def workload(manifests: Manifests) -> dict[str, Any]:
    return next(m for m in manifests if m["kind"] in ("RayJob", "RayService", "RayCluster"))


def cluster(manifests: Manifests) -> dict[str, Any]:
    spec = workload(manifests)["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def group(manifests: Manifests, index: int) -> dict[str, Any]:
    return (
        cluster(manifests)["headGroupSpec"]
        if index == HEAD
        else cluster(manifests)["workerGroupSpecs"][index]
    )


def pod(manifests: Manifests, index: int) -> dict[str, Any]:
    return group(manifests, index)["template"]["spec"]


def main(manifests: Manifests, index: int) -> dict[str, Any]:
    return pod(manifests, index)["containers"][0]


def disk(manifests: Manifests, index: int, name: str) -> dict[str, Any]:
    return next(volume for volume in pod(manifests, index)["volumes"] if volume["name"] == name)


def entry(manifests: Manifests, old: str, new: str) -> None:
    spec = workload(manifests)["spec"]
    key = "entrypoint" if "entrypoint" in spec else "serveConfigV2"
    assert old in spec[key]
    spec[key] = spec[key].replace(old, new)


def env(manifests: Manifests, index: int, name: str, **value: Any) -> None:
    entries = main(manifests, index)["env"]
    entries[:] = [one for one in entries if one["name"] != name] + [{"name": name, **value}]


def without(manifests: Manifests, kind: str, name: str) -> None:
    manifests[:] = [m for m in manifests if (m["kind"], m["metadata"]["name"]) != (kind, name)]


def named(manifests: Manifests, kind: str, name: str) -> dict[str, Any]:
    return next(m for m in manifests if (m["kind"], m["metadata"]["name"]) == (kind, name))


def hook(manifests: Manifests, index: int, *command: str) -> None:
    main(manifests, index)["lifecycle"]["preStop"]["exec"]["command"] = list(command)


def resources(manifests: Manifests, index: int, kind: str, **amounts: str) -> None:
    main(manifests, index)["resources"][kind] |= {
        name.replace("_", "-"): amount for name, amount in amounts.items()
    }


GPUS = {"nvidia.com/gpu": "4"}
MONITOR = {
    "kind": "PodMonitor",
    "metadata": {"name": "other"},
    "spec": {"selector": {}, "podMetricsEndpoints": [{"port": "metric"}]},
}
OPEN = {"from": [{"namespaceSelector": {}}], "ports": [{"port": 8265}]}
SPOT = {"key": "cloud.google.com/gke-spot", "operator": "Exists"}
PAPER, SERVE, ELASTIC = "16gpu-paper", "serve", "spot"

# Of each rule: an overlay, what is broken in it, and words of the message.
Case = tuple[str, str, Callable[[Manifests], object], str]
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
    (
        "entrypoints-load",
        PAPER,
        lambda m: entry(m, "clips.cpus=1", "clips.cpu=1"),
        "there is no key clips.cpu; did you mean clips.cpus?",
    ),
    (
        "entrypoints-load",
        PAPER,
        lambda m: entry(m, "-rl.yaml", "-lr.yaml"),
        "there is no conf/videozoomer-7b-lr.yaml",
    ),
    (
        "entrypoints-load",
        SERVE,
        lambda m: entry(m, "app:build", "app:built"),
        "has the functions application, build",
    ),
    (
        "entrypoints-load",
        SERVE,
        lambda m: entry(m, "clips.disk_gb: 80", "clips.disk_gb: -1"),
        "must not be negative",
    ),
    (
        "runs-use-this-cluster",
        PAPER,
        lambda m: entry(m, "ray.address=auto", "ray.address=10.0.0.7:6379"),
        "ray.address is '10.0.0.7:6379', another cluster",
    ),
    ("runs-use-this-cluster", PAPER, lambda m: entry(m, "ray.groups=true", ""), "ray.groups is off"),
    (
        "runs-use-this-cluster",
        "cpu-rehearsal",
        lambda m: entry(m, "ray.gpus=never", "ray.gpus=auto"),
        "ray.gpus is 'auto' and groups have no GPUs",
    ),
    (
        "submissions-go-on",
        PAPER,
        lambda m: entry(m, " name=videozoomer-7b-rl", ""),
        "the entrypoint names no run",
    ),
    ("submissions-go-on", PAPER, lambda m: workload(m)["spec"].pop("backoffLimit"), "backoffLimit is 0"),
    ("submissions-go-on", PAPER, lambda m: workload(m)["spec"].update(jobId="a"), "jobId is a; remove it"),
    (
        "submissions-go-on",
        PAPER,
        lambda m: workload(m)["spec"].update(shutdownAfterJobFinishes=False),
        "GPUs are held after the end",
    ),
    (
        "submissions-go-on",
        PAPER,
        lambda m: workload(m)["spec"].update(submissionMode="HTTPMode"),
        "submissionMode is HTTPMode",
    ),
    (
        "drivers-run-on-the-head",
        PAPER,
        lambda m: workload(m)["spec"].update(entrypointResources="head: 1"),
        "entrypointResources is head: 1; set",
    ),
    (
        "drivers-run-on-the-head",
        PAPER,
        lambda m: workload(m)["spec"].update(entrypointNumCpus=1),
        "entrypointNumCpus is 1, and the head has none",
    ),
    (
        "runs-are-on-shared-storage",
        PAPER,
        lambda m: named(m, "PersistentVolumeClaim", "vz-ray-runs")["spec"].update(
            accessModes=["ReadWriteOnce"]
        ),
        "PersistentVolumeClaim vz-ray-runs: accessModes is ['ReadWriteOnce']",
    ),
    (
        "runs-are-on-shared-storage",
        PAPER,
        lambda m: entry(m, "runs=/runs", "runs=/scratch/runs"),
        "runs=/scratch/runs is not on a claim, and is lost with the pod",
    ),
    (
        "runs-are-on-shared-storage",
        "interactive",
        lambda m: disk(m, LEARNER, "runs").update(persistentVolumeClaim={"claimName": "vz-ray-models"}),
        "runs=/runs is on vz-ray-models, vz-ray-runs",
    ),
    (
        "actors-fit",
        PAPER,
        lambda m: group(m, ROLLOUT).update(minReplicas=4, replicas=4, maxReplicas=4),
        "actors may ask for 8 GPU and 4 pods have 4",
    ),
    (
        "actors-fit",
        PAPER,
        lambda m: entry(m, "rollout.workers=8", "rollout.workers=4 rollout.engine.tensor_parallel=2"),
        "one rollout actor needs 2 GPUs and 1 CPUs, more than a pod has",
    ),
    (
        "actors-fit",
        "sft-8gpu",
        lambda m: [cluster(m)["workerGroupSpecs"].pop(1)],
        "its actors ask for clips, which no group has",
    ),
    (
        "actors-fit",
        PAPER,
        lambda m: entry(m, "clips.actors=24", "clips.actors=40"),
        "actors may ask for 40 CPU and 2 pods have 32",
    ),
    (
        "clip-caches-fit",
        PAPER,
        lambda m: entry(m, "clips.disk_gb=150", "clips.disk_gb=300"),
        "clips.disk_gb and clips.downloads_gb are 350",
    ),
    (
        "clip-caches-fit",
        SERVE,
        lambda m: entry(m, "disk_dir: /scratch/clips", "disk_dir: /cache"),
        "clips.disk_dir is '/cache' on a volume of 0 GB",
    ),
    (
        "checkpoints-have-time",
        PAPER,
        lambda m: workload(m)["metadata"]["annotations"].update({"vz-ray/checkpoint-seconds": "900"}),
        "RAY_JOB_STOP_WAIT_TIME_S is 600 and a checkpoint takes 900 s",
    ),
    (
        "checkpoints-have-time",
        PAPER,
        lambda m: workload(m)["metadata"].pop("annotations"),
        "the annotation vz-ray/checkpoint-seconds is missing",
    ),
    (
        "checkpoints-have-time",
        "interactive",
        lambda m: pod(m, HEAD).update(terminationGracePeriodSeconds=30),
        "head: terminationGracePeriodSeconds is 30 and its hook may take 630; set 660",
    ),
    (
        "checkpoints-have-time",
        PAPER,
        lambda m: hook(m, LEARNER, "sleep", "630"),
        "learner: its preStop hook gives wait-for-jobs 0 s and a job may take 600",
    ),
    (
        "nodes-are-drained",
        ELASTIC,
        lambda m: hook(m, ROLLOUT, "sleep", "90"),
        "rollout: its preStop hook is 'sleep 90'; call `vz-ray drain --seconds N",
    ),
    (
        "nodes-are-drained",
        PAPER,
        lambda m: pod(m, CLIPS).pop("terminationGracePeriodSeconds"),
        "clips: terminationGracePeriodSeconds is 30 and draining may take 90; set 120",
    ),
    (
        "nodes-are-drained",
        SERVE,
        lambda m: entry(m, "ray.groups: true", "ray.groups: true\n      drain_s: 200"),
        "with N of at least 200",
    ),
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
        lambda m: env(m, 0, "HF_TOKEN", valueFrom={"secretKeyRef": {"name": "vz-ray-hub", "key": "key"}}),
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
    bundle = Bundle(manifests)
    found = {rule_name: list(check(bundle)) for rule_name, check in RULES.items()}
    assert any(words in message for message in found[rule]), found[rule]
    assert [rule_name for rule_name, messages in found.items() if messages] == [rule]


def test_every_rule_has_a_case_and_says_what_it_is_about():
    assert {case[0] for case in CASES} == set(RULES)
    assert all(rule.__doc__ for rule in RULES.values())


def test_rules_of_a_claim_on_one_machine_take_its_annotation(overlay):
    manifests = overlay("cpu-rehearsal")
    assert not list(RULES["runs-are-on-shared-storage"](Bundle(manifests)))
    named(manifests, "PersistentVolumeClaim", "vz-ray-runs")["metadata"].pop("annotations")
    [message] = set(RULES["runs-are-on-shared-storage"](Bundle(manifests)))
    assert 'or annotate it vz-ray/one-machine: "true"' in message


@pytest.mark.parametrize(
    ("text", "number"),
    [("500m", 0.5), ("2Gi", 2.0**31), ("1k", 1000.0), (8, 8.0), ("1.5Mi", 1.5 * 2**20), ("1e3", 1000.0)],
)
def test_quantities_are_kubernetes_own(text, number):
    assert quantity(text) == number


@pytest.mark.parametrize("text", ["lots", "1gb", "", "-1", "1 Gi B"])
def test_what_is_no_quantity_is_refused(text):
    with pytest.raises(ValueError, match="is not a quantity"):
        quantity(text)
