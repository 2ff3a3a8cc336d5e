"""Comparison with a cluster, through a program that answers like kubectl."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from vz_ray.cli import app
from vz_ray.k8s import live
from vz_ray.k8s.live import Kubectl, find_changes, find_missing, unknown_fields
from vz_ray.k8s.manifest import Manifest, read_manifests
from vz_ray.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = json.loads((ROOT / "tests/cluster/kuberay.schema.json").read_text())["$defs"]
FAKE_KUBECTL = """#!{python}
import json, sys
kind, name = sys.argv[2:4]
namespace = next((a.split("=")[1] for a in sys.argv if a.startswith("--namespace=")), "")
objects = json.load(open({objects!r}))
answer = objects.get("/".join((kind.lower(), namespace, name)))
if answer == "refused":
    sys.exit("Error from server (Forbidden): no access")
print(json.dumps(answer) if answer else "")
"""


class Cluster:
    """Objects that the program returns."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "objects.json"
        self.objects: dict[str, Any] = {}
        program = folder / "kubectl"
        program.write_text(FAKE_KUBECTL.format(python=sys.executable, objects=str(self.file)))
        program.chmod(0o755)

    def put(self, manifest: Manifest | str, kind: str, name: str, namespace: str = "vz-ray") -> None:
        self.objects[f"{kind}/{namespace}/{name}"] = manifest
        self.file.write_text(json.dumps(self.objects))

    def drop(self, kind: str, name: str, namespace: str = "vz-ray") -> None:
        del self.objects[f"{kind}/{namespace}/{name}"]
        self.file.write_text(json.dumps(self.objects))


def crd(kind: str) -> Manifest:
    schema = deepcopy(SCHEMAS[kind])
    for field in ("rayClusterSpec", "rayClusterConfig"):
        if field in schema["properties"]["spec"]["properties"]:
            schema["properties"]["spec"]["properties"][field] = SCHEMAS["RayCluster"]["properties"]["spec"]
    return {"spec": {"versions": [{"name": "v1", "schema": {"openAPIV3Schema": schema}}]}}


def read(name: str) -> list[Manifest]:
    return read_manifests(ROOT / "k8s" / "examples" / f"{name}.yaml")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """A cluster with KubeRay and the site, and no run."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    made = Cluster(tmp_path)
    for kind in ("RayJob", "RayService"):
        made.put(crd(kind), "crd", f"{kind.lower()}s.ray.io", "")
    made.put({"metadata": {}}, "namespace", "vz-ray", "")
    for claim in ("runs", "videos", "models", "uploads"):
        modes = ["ReadOnlyMany"] if claim == "videos" else ["ReadWriteMany"]
        made.put({"metadata": {}, "spec": {"accessModes": modes}}, "persistentvolumeclaim", f"vz-ray-{claim}")
    made.put({"data": {"auth_token": "eA=="}}, "secret", "vz-ray-auth")
    made.put({"data": {"hashes": "eA=="}}, "secret", "vz-ray-keys")
    return made


def test_complete_cluster_misses_nothing(cluster: Cluster):
    assert find_missing(read("train-spot"), Kubectl()) == []
    assert find_missing(read("serve"), Kubectl()) == []


def without_secret_name(cluster: Cluster) -> None:
    old = crd("RayJob")
    spec = old["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    del deepcopy_into(spec, "rayClusterSpec")["properties"]["authOptions"]["properties"]["secretName"]
    cluster.put(old, "crd", "rayjobs.ray.io", "")


def deepcopy_into(spec: Manifest, field: str) -> Manifest:
    spec["properties"][field] = deepcopy(spec["properties"][field])
    return dict(spec["properties"][field])


def run_with(entrypoint: str) -> Callable[[Cluster], None]:
    def put(cluster: Cluster) -> None:
        job = deepcopy(read("train-spot")[0])
        job["spec"]["entrypoint"] = entrypoint or job["spec"]["entrypoint"]
        cluster.put({**job, "status": {"jobDeploymentStatus": "Running"}}, "rayjob", "spot")

    return put


def claim_with(mode: str, name: str = "vz-ray-runs") -> Callable[[Cluster], None]:
    return lambda c: c.put({"metadata": {}, "spec": {"accessModes": [mode]}}, "persistentvolumeclaim", name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.drop("crd", "rayjobs.ray.io", ""), "the cluster has no rayjobs.ray.io: install KubeRay 1.7"),
        (without_secret_name, "has no field spec.rayClusterSpec.authOptions.secretName: update to KubeRay 1.7"),
        (lambda c: c.drop("namespace", "vz-ray", ""), "namespace vz-ray does not exist: kubectl apply -k k8s/site"),
        (run_with(""), "RayJob spot is already there (status Running), and apply would not restart it"),
        (run_with("vz-ray train x.yaml"), "RayJob spot is already there with another entrypoint (status Running)"),
        (lambda c: c.drop("persistentvolumeclaim", "vz-ray-runs"), "claim vz-ray-runs does not exist"),
        (claim_with("ReadOnlyMany"), "claim vz-ray-runs is ReadOnlyMany, and pods write to /runs: use ReadWriteMany"),
        (claim_with("ReadWriteOnce"), "claim vz-ray-runs is ReadWriteOnce, so that pods of one node only"),
        (lambda c: c.drop("secret", "vz-ray-auth"), "secret vz-ray-auth with key auth_token does not exist"),
        (lambda c: c.put({"data": {}}, "secret", "vz-ray-auth"), "secret vz-ray-auth with key auth_token"),
    ],
)
def test_missing_part_gets_one_line(cluster: Cluster, change, message):
    change(cluster)
    (problem,) = find_missing(read("train-spot"), Kubectl())
    assert message in problem


def test_unknown_fields_of_nested_objects():
    schema = SCHEMAS["RayCluster"]
    value = {"kind": "RayCluster", "spec": {"workerGroupSpecs": [{"groupName": "a", "labels": {"x": "y"}, "wrong": 1}]}}
    assert list(unknown_fields(schema, value)) == ["spec.workerGroupSpecs.wrong"]


def deployed(cluster: Cluster, name: str) -> list[Manifest]:
    """Put the objects of an example on the cluster, as the API server returns them: with defaults and status."""
    manifests = read(name)
    for manifest in manifests:
        served = deepcopy(manifest)
        served["metadata"] |= {"uid": "1", "resourceVersion": "7"}
        served["status"] = {"x": 1}
        if "backoffLimit" in served["spec"]:
            served["spec"]["activeDeadlineSeconds"] = 0
        cluster.put(served, manifest["kind"].lower(), manifest["metadata"]["name"])
    return manifests


@pytest.mark.parametrize("name", ["train-spot", "serve"])
def test_unchanged_run_has_no_diff(cluster: Cluster, name: str):
    assert find_changes(deployed(cluster, name), Kubectl()) == []


def test_new_run_is_new(cluster: Cluster):
    assert find_changes(read("rehearsal"), Kubectl())[0] == "RayJob rehearsal: new"


def edited(manifests: list[Manifest], change: Callable[[Manifest], Any]) -> list[str]:
    manifests = deepcopy(manifests)
    content = yaml.safe_load(manifests[0]["spec"]["serveConfigV2"])
    change(content["applications"][0])
    manifests[0]["spec"]["serveConfigV2"] = yaml.safe_dump(content)
    return find_changes(manifests, Kubectl())


def test_new_weights_of_a_service_restart_nothing(cluster: Cluster):
    manifests = deployed(cluster, "serve")
    lines = edited(manifests, lambda a: a["deployments"][0]["user_config"].update(model="/models/b", version=2))
    assert lines[-1] == "RayService agent: engines load the new weights in place"
    assert len(lines) == 3
    assert "/models/agent -> /models/b" in lines[0]
    lines = edited(manifests, lambda a: a["args"].update({"engine.max_num_seqs": 8}))
    assert lines[-1] == "RayService agent: Ray Serve restarts every replica"
    lines = edited(manifests, lambda a: a["args"].pop("clips.disk_cache_gib"))
    assert "clips.disk_cache_gib: 80 -> nothing" in lines[0]
    manifests[0]["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplicas"] = 9
    (_, effect) = find_changes(manifests, Kubectl())
    assert effect == "RayService agent: the number of pods changes in place"


def test_changed_and_removed_groups_of_a_job(cluster: Cluster):
    manifests = deepcopy(deployed(cluster, "train-spot"))
    groups = manifests[0]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    del groups[2]
    groups[1]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] = "99Gi"
    lines = find_changes(manifests, Kubectl())
    path = "spec.rayClusterSpec.workerGroupSpecs[rollout].template.spec.containers[ray-worker].resources.limits.memory"
    assert f"RayJob spot: {path}: 80Gi -> 99Gi" in lines
    assert any("workerGroupSpecs[clips]: {" in line and line.endswith("-> nothing") for line in lines)
    assert lines[-1] == "RayJob spot: a running job keeps its cluster; delete it and apply again, the run resumes"


def test_kubectl_errors_get_one_line(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    cluster.put("refused", "crd", "rayjobs.ray.io", "")
    with pytest.raises(UserError, match=r"kubectl get crd rayjobs.ray.io failed: .*Forbidden.*; check --context"):
        find_missing(read("train-spot"), Kubectl())
    (tmp_path / "kubectl").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(live, "REQUEST_TIMEOUT_S", 0.3)
    with pytest.raises(UserError, match=r"had no answer for 0\.3 s"):
        Kubectl("other").get("pod", "x")
    (tmp_path / "kubectl").unlink()
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(live.sys, "executable", "/nowhere/python")
    with pytest.raises(UserError, match="kubectl is not installed"):
        Kubectl().get("pod", "x")


def test_commands_print_and_exit(cluster: Cluster, tmp_path: Path):
    runner, file = CliRunner(), str(ROOT / "k8s/examples/train-spot.yaml")
    result = runner.invoke(app, ["k8s", "check", file, "--cluster"])
    assert (result.exit_code, result.stdout) == (0, f"{file}: 3 objects, no problem\n")
    result = runner.invoke(app, ["k8s", "diff", file])
    assert (result.exit_code, result.stdout.splitlines()[0]) == (1, "RayJob spot: new")
    deployed(cluster, "train-spot")
    result = runner.invoke(app, ["k8s", "diff", file])
    assert (result.exit_code, result.stdout) == (0, f"{file}: no change\n")
    broken = tmp_path / "broken.yaml"
    broken.write_text(Path(file).read_text().replace("backoffLimit: 3", "backoffLimit: 9"))
    result = runner.invoke(app, ["k8s", "check", str(broken)])
    assert result.exit_code == 1
    assert "backoffLimit is 9" in result.stdout
