"""Scripts for a bare GPU machine: the bundle's contents, and the order and time limits of the checks."""

from __future__ import annotations

import importlib.util
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bundle() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_bundle", ROOT / "scripts" / "gpu_bundle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_package_is_locked(bundle: ModuleType) -> None:
    assert {*bundle.PACKAGES, *bundle.SOURCES} <= bundle.read_pins().keys()


def kernel(arch: int, code: bytes) -> bytes:
    """Return one entry of a fat binary: a header of 64 bytes, then the code."""
    header = struct.pack("<HHIQ", 2, 0x101, 64, len(code)) + bytes(12) + struct.pack("<I", arch)
    return header.ljust(64, b"\0") + code


def elf(section: bytes) -> bytes:
    """Return a 64-bit ELF file with the sections `.nv_fatbin` and `.shstrtab`."""
    names = b"\0.nv_fatbin\0.shstrtab\0"
    table = 64 + len(section) + len(names)
    header = bytearray(64)
    struct.pack_into("<Q", header, 0x28, table)
    struct.pack_into("<HHH", header, 0x3A, 64, 2, 1)
    sections = [(1, 64, len(section)), (12, 64 + len(section), len(names))]
    rows = b"".join(struct.pack("<IIQQQQ", name, 1, 0, 0, at, size).ljust(64, b"\0") for name, at, size in sections)
    return bytes(header) + section + names + rows


def test_kernels_of_other_architectures_are_cleared(bundle: ModuleType, tmp_path: Path) -> None:
    entries = kernel(80, b"A" * 24) + kernel(90, b"H" * 32)
    fatbin = struct.pack("<IHHQ", bundle.FATBIN_MAGIC, 1, 16, len(entries)) + entries
    library = tmp_path / "lib.so"
    library.write_bytes(elf(fatbin + bytes(8) + fatbin))
    before = library.read_bytes()
    bundle.clear_other_kernels(library, 90)
    after = library.read_bytes()
    assert after == before.replace(b"A", b"\0")
    assert after.count(b"H") == 64
    with pytest.raises(ValueError, match=r"lib\.so has kernels for \[80, 90\], none for 100"):
        bundle.clear_other_kernels(library, 100)


@pytest.fixture
def run_check(tmp_path: Path) -> Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]:
    """Return a function that runs `gpu_check.sh` with a Python that records its arguments."""

    def run(*arguments: str, script: str = "") -> tuple[subprocess.CompletedProcess[str], list[str]]:
        python, calls = tmp_path / "python", tmp_path / "calls"
        python.write_text(f'#!/bin/sh\n[ "$1" = -c ] || echo "$*" >> {calls}\n{script}\n')
        python.chmod(0o755)
        environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "SITE": str(tmp_path / "site")}
        command = [str(ROOT / "scripts" / "gpu_check.sh"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        return done, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_first_part_runs_every_step_on_a_gpu(run_check, tmp_path: Path) -> None:
    done, calls = run_check("first", "100", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout
    assert [call.split()[1] for call in calls] == [
        "vz_ray.learner.gpu_measurements", "pytest", "pytest", "benchmarks.learner",
    ]  # fmt: skip
    assert all(" -m gpu " in call for call in calls if " pytest " in call)
    assert "--shape 7b --device cuda" in calls[-1]
    assert "first part done, 0 steps failed" in done.stdout
    assert {file.name for file in (tmp_path / "out").glob("*.log")} == {
        "devices.log", "learner.log", "engine.log", "learner-benchmark.log",
    }  # fmt: skip


def test_failed_steps_do_not_stop_the_others(run_check, tmp_path: Path) -> None:
    """A failed engine is tried again with vLLM's first model runner."""
    done, calls = run_check("first", "100", str(tmp_path / "out"), script='[ "$2" != pytest ]')
    assert done.returncode == 3
    assert len(calls) == 5
    assert "engine-v1: exit status 1" in done.stdout
    assert "first part done, 3 steps failed" in done.stdout


def test_second_part_rehearses_with_a_small_shape(run_check, tmp_path: Path) -> None:
    done, (call,) = run_check("second", "100", str(tmp_path / "out"), script='[ "$1" != -c ]')
    assert done.returncode == 0, done.stdout
    assert "rehearsing on the CPU" in done.stdout
    assert "--shape small --requests 2" in call


def test_step_is_killed_at_the_time_limit(run_check, tmp_path: Path) -> None:
    done, calls = run_check("first", "12", str(tmp_path / "out"), script='[ "$1" = -c ] || exec sleep 30')
    assert len(calls) == 1
    assert "devices: exit status 124" in done.stdout
    assert done.stdout.count("skipped, no time is left") >= 3


@pytest.mark.parametrize("arguments", [(), ("third", "100"), ("first", "soon")])
def test_wrong_arguments_are_refused(run_check, arguments: tuple[str, ...]) -> None:
    done, calls = run_check(*arguments)
    assert done.returncode == 64
    assert "usage: gpu_check.sh first|second SECONDS [OUT]" in done.stderr
    assert calls == []
