"""The GPU smoke check, on the CPU: every stage runs to its end without Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NO_RAY = """
import sys
class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "av"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoRay())
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("shape", [(), ("--shape", "small")], ids=["tiny", "random weights"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_stage_succeeds_without_ray_and_av(tmp_path: Path, dtype: str, shape: tuple[str, ...]) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_RAY)
    command = [sys.executable, "-m", "benchmarks.gpu_smoke_check", "assets/tiny-base", "--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    command += [*shape, "--dtype", dtype]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures == json.loads((tmp_path / "out" / "gpu-smoke-check.json").read_text())
    assert set(figures) == {"torch", "device", "engine"} | ({"checkpoint"} if shape else {"attention", "grpo"})
    publishes = [value for name, value in figures["engine"].items() if name.startswith("publish")]
    assert len(publishes) == 3
    assert all(publish["gap"] <= publish["tolerance"] for publish in publishes)
