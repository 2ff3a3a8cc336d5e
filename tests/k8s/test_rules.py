"""Every rule of `vz-ray k8s check` finds the fault that it is for."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from vz_ray.k8s.manifest import Manifest, parse_quantity, read_manifests, workload_of
from vz_ray.k8s.rules import find_problems
from vz_ray.utils.errors import UserError

EXAMPLES = Path(__file__).resolve().parents[2] / "k8s" / "examples"


@cache
def read(name: str) -> list[Manifest]:
    return read_manifests(EXAMPLES / f"{name}.yaml")


def group(manifests: list[Manifest], name: str) -> Manifest:
    """Spec of a group, to be changed in place."""
    cluster = manifests[0]["spec"].get("rayClusterSpec") or manifests[0]["spec"]["rayClusterConfig"]
    if name == "head":
        return dict(cluster)["headGroupSpec"]
    return next(spec for spec in cluster["workerGroupSpecs"] if spec["groupName"] == name)


def pod(manifests: list[Manifest], name: str) -> Manifest:
    return group(manifests, name)["template"]["spec"]


def container(manifests: list[Manifest], name: str) -> Manifest:
    return pod(manifests, name)["containers"][0]


def edit_entrypoint(old: str, new: str) -> Callable[[list[Manifest]], Any]:
    def edit(manifests: list[Manifest]) -> None:
        assert old in manifests[0]["spec"]["entrypoint"]
        manifests[0]["spec"]["entrypoint"] = manifests[0]["spec"]["entrypoint"].replace(old, new)

    return edit


def edit_service(change: Callable[[Manifest], Any]) -> Callable[[list[Manifest]], Any]:
    def edit(manifests: list[Manifest]) -> None:
        content = yaml.safe_load(manifests[0]["spec"]["serveConfigV2"])
        change(content["applications"][0])
        manifests[0]["spec"]["serveConfigV2"] = yaml.safe_dump(content)

    return edit


def limits(name: str, **amounts: str) -> Callable[[list[Manifest]], Any]:
    return lambda m: container(m, name)["resources"]["limits"].update(amounts)


def claim() -> Manifest:
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "spot-data"}}


FAULTS: list[tuple[str, Callable[[list[Manifest]], Any], str]] = [
    ("train-spot", edit_entrypoint("vz-ray train", "python train.py"), "its entrypoint fails: it starts with python"),
    ("train-spot", edit_entrypoint("name=spot", ""), "it has no name="),
    ("train-spot", edit_entrypoint("clips.disk_cache_gib", "clips.disk_cache_gb"), "unknown key clips.disk_cache_gb"),
    ("train-spot", edit_entrypoint("rollout.node_group=rollout", ""), "rollout workers need the node group ''"),
    ("train-spot", edit_entrypoint("ray.use_gpus=always", "ray.use_gpus=auto"), "use auto and always"),
    ("train-spot", edit_entrypoint("max_workers=16", "max_workers=17"), "its pods have 128 and 16; raise maxReplicas"),
    ("train-spot", limits("rollout", cpu="500m"), "one of the rollout workers .* fits no pod of rollout"),
    ("train-spot", edit_entrypoint("disk_cache_gib=150", "disk_cache_gib=500"), "the caches of clips do not fit"),
    ("train-16gpu", limits("clips", **{"ephemeral-storage": "100Gi"}), "volumes of clips are larger"),
    ("train-16gpu", limits("learner", memory="40Gi"), "object-store-memory <= /dev/shm < memory"),
    ("train-16gpu", limits("learner", **{"nvidia.com/gpu": "4"}), "learner requests 8 GPUs and its limit differs"),
    ("train-16gpu", lambda m: group(m, "learner").update(resources={}), "learner does not advertise its node group"),
    ("train-16gpu", lambda m: group(m, "head").update(resources={"head": "1"}), "the head advertises CPUs"),
    (
        "train-16gpu",
        lambda m: container(m, "learner")["volumeMounts"][0].update(readOnly=True),
        "mounted read-only in learner",
    ),
    ("train-16gpu", lambda m: container(m, "head")["volumeMounts"].pop(0), "runs '/runs' is on no claim in head"),
    ("train-16gpu", lambda m: container(m, "clips").update(image="x:ray2.60.0"), "it has 2 images"),
    ("serve", lambda m: m[0]["spec"]["rayClusterConfig"].update(rayVersion="2.56.0"), "does not name Ray 2.56.0"),
    (
        "train-16gpu",
        lambda m: next(e for e in container(m, "head")["env"] if e["name"] == "RAY_JOB_STOP_WAIT_TIME_S").update(
            value="9"
        ),
        "RAY_JOB_STOP_WAIT_TIME_S is 9; a stop needs",
    ),
    ("train-16gpu", lambda m: container(m, "learner").pop("lifecycle"), "the hook of learner ends before Ray kills"),
    ("train-16gpu", lambda m: pod(m, "head").update(terminationGracePeriodSeconds=60), "grace period of head is 60 s"),
    ("serve", lambda m: container(m, "serve").pop("lifecycle"), "hook of serve drains for 0 s; use at least 120"),
    ("train-spot", lambda m: pod(m, "head").pop("tolerations"), "head stays on a node that is unreachable for 300 s"),
    ("train-spot", lambda m: pod(m, "rollout").pop("affinity"), "tolerations and affinity of spot nodes together"),
    ("train-spot", lambda m: group(m, "rollout").pop("labels"), "Ray's label, tolerations and affinity"),
    (
        "train-spot",
        lambda m: [
            group(m, "learner").update(labels=group(m, "rollout")["labels"]),
            pod(m, "learner").update({k: pod(m, "rollout")[k] for k in ("affinity", "tolerations")}),
        ],
        "learner is on spot nodes",
    ),
    ("train-spot", lambda m: m[0]["spec"]["rayClusterSpec"].pop("authOptions"), "anyone could run code"),
    (
        "serve",
        lambda m: container(m, "serve")["env"].append(
            {"name": "X", "valueFrom": {"secretKeyRef": {"name": "other", "key": "k"}}}
        ),
        "secret other with key k is unknown",
    ),
    ("serve", edit_service(lambda a: a["args"].update(model="/models/agent")), "args has model"),
    ("serve", edit_service(lambda a: a.pop("deployments")), "no model and version in user_config"),
    ("train-spot", lambda m: m[0]["spec"].update(backoffLimit=10), "backoffLimit is 10; each retry deletes the logs"),
    ("train-spot", lambda m: m.append(claim()), "deleting the run would delete it; move it to k8s/site"),
    ("train-spot", lambda m: m[1]["metadata"].update(name="head"), "is not named after the run"),
]


@pytest.mark.parametrize(("name", "fault", "message"), FAULTS, ids=[message for _, _, message in FAULTS])
def test_rule_finds_its_fault(name, fault, message):
    manifests = deepcopy(read(name))
    fault(manifests)
    problems = find_problems(manifests)
    assert [problem for problem in problems if re.search(message, problem)], problems


def test_file_needs_one_workload(tmp_path: Path):
    with pytest.raises(UserError, match="got 0 workloads"):
        find_problems([claim()])
    with pytest.raises(UserError, match="got 2 workloads"):
        find_problems([*read("serve"), *read("rehearsal")])
    for text, message in (
        ("", "is empty"),
        ("a: [", "is not YAML"),
        ("a: 1", "document 1 of .* is no Kubernetes object"),
    ):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            read_manifests(tmp_path / "x.yaml")


def test_quantities():
    assert [parse_quantity(text) for text in ("500m", 2, "2Gi", "1k")] == [0.5, 2, 2 * 2**30, 1000]
    with pytest.raises(UserError, match="'2Gb' is not a quantity"):
        parse_quantity("2Gb")


def test_service_has_no_learner():
    assert [g.name for g in workload_of(read("serve")).groups] == ["head", "serve"]
