"""The wheel contains every file that it needs: its commands work outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `vz-ray` command of a fresh environment that shares this one's third-party packages only."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, source)
    for name in ("vz_ray", "conf", "assets"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run([*pip, *build], check=True, timeout=200, cwd=folder)
    (wheel,) = folder.glob("vz_ray-*.whl")
    venv.create(folder / "env", symlinks=True)
    site = next((folder / "env/lib").glob("python*/site-packages"))
    install = [
        "--python",
        str(folder / "env/bin/python"),
        "install",
        "--quiet",
        "--no-deps",
        "--ignore-installed",
        str(wheel),
    ]
    subprocess.run([*pip, *install], check=True, timeout=200, cwd=folder)
    # Appended as a plain path: the .pth file of an editable install there is not read.
    (site / "third_party.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "env/bin/vz-ray"


def run(command: Path, directory: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(command), *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_help_works_outside_checkout(installed: Path, tmp_path: Path):
    assert "quickstart" in run(installed, tmp_path, "--help")


def test_quickstart_dry_run_finds_shipped_config_and_model(installed: Path, tmp_path: Path):
    output = run(installed, tmp_path, "quickstart", "--dry-run")
    model = next(line.split(": ", 1)[1] for line in output.splitlines() if line.startswith("model: "))
    assert (Path(model) / "model.safetensors").is_file()
    assert str(installed.parent.parent) in model


def test_plan_works_outside_checkout(installed: Path, tmp_path: Path):
    for config, component in (("rl", "learner, engine asleep"), ("sft", "learner")):
        command = ["plan", f"conf/videozoomer-7b-{config}.yaml", "model=Qwen2.5-VL-7B", "--gpu-memory", "80GiB"]
        assert f"{component}: fits" in run(installed, tmp_path, *command)
