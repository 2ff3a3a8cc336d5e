"""Rules of jobs: entrypoints, checkpoints, ends of pods."""

from __future__ import annotations

import pytest

from cluster.manifests import Bundle
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
    disk,
    entry,
    group,
    hook,
    named,
    only,
    pod,
    rules_of,
    workload,
)

CASES: list[Case] = [
    (
        "entrypoints-load",
        PAPER,
        lambda m: entry(m, "clips.cpus_per_actor=1", "clips.cpu=1"),
        "unknown key clips.cpu; did you mean clips.cpus_per_actor?",
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
        lambda m: entry(m, "clips.disk_cache_gib: 80", "clips.disk_cache_gib: -1"),
        "must not be negative",
    ),
    (
        "runs-use-this-cluster",
        PAPER,
        lambda m: entry(m, "ray.address=auto", "ray.address=10.0.0.7:6379"),
        "ray.address is '10.0.0.7:6379', another cluster",
    ),
    (
        "runs-use-this-cluster",
        PAPER,
        lambda m: entry(m, "rollout.node_group=rollout", ""),
        "rollout.node_group is '', so its actors land on any node; add rollout.node_group=rollout",
    ),
    (
        "runs-use-this-cluster",
        "cpu-rehearsal",
        lambda m: entry(m, "ray.use_gpus=never", "ray.use_gpus=auto"),
        "ray.use_gpus is 'auto' and groups have no GPUs",
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
        lambda m: entry(
            m, "rollout.num_workers=8", "rollout.num_workers=4 rollout.engine.tensor_parallel_size=2"
        ),
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
        lambda m: entry(m, "clips.num_actors=24", "clips.num_actors=40"),
        "actors may ask for 40 CPU and 2 pods have 32",
    ),
    (
        "clip-caches-fit",
        PAPER,
        lambda m: entry(m, "clips.disk_cache_gib=150", "clips.disk_cache_gib=300"),
        "clips.disk_cache_gib and clips.download_cache_gib are 350",
    ),
    (
        "clip-caches-fit",
        SERVE,
        lambda m: entry(m, "disk_dir: /scratch/clips", "disk_dir: /cache"),
        "clips.disk_cache_dir is '/cache' on a volume of 0 GB",
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
        lambda m: entry(m, "node_group: serve", "node_group: serve\n      timeouts: {drain_s: 200}"),
        "with N of at least 200",
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
    assert {case[0] for case in CASES} == rules_of("jobs")
    assert all(RULES[case[0]].__doc__ for case in CASES)


def test_rules_of_a_claim_on_one_machine_take_its_annotation(overlay):
    manifests = overlay("cpu-rehearsal")
    assert not list(RULES["runs-are-on-shared-storage"](Bundle(manifests)))
    named(manifests, "PersistentVolumeClaim", "vz-ray-runs")["metadata"].pop("annotations")
    [message] = set(RULES["runs-are-on-shared-storage"](Bundle(manifests)))
    assert 'or annotate it vz-ray/one-machine: "true"' in message
