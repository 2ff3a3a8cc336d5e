"""Environment checks of `vz-ray doctor`."""

from __future__ import annotations

import py_compile
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from rich.console import Console

from vz_ray.jobs import doctor
from vz_ray.monitoring import checks
from vz_ray.monitoring.checks import CheckResult, CheckStatus
from vz_ray.utils.errors import UserError


def test_environment_matches_the_lock_files():
    assert doctor.check_locked_versions().status is CheckStatus.OK, doctor.check_locked_versions().detail


def test_copies_vendored_by_setuptools_are_ignored():
    import setuptools

    assert setuptools.__version__
    assert doctor.check_locked_versions().status is CheckStatus.OK, doctor.check_locked_versions().detail


def test_different_and_missing_packages_are_named(tmp_path):
    (tmp_path / "cpu.lock").write_text("# comment\nnumpy==0.1\nno-such-package==1.0\n")
    check = doctor.check_locked_versions(tmp_path)
    assert check.status is CheckStatus.FAILED
    assert "no-such-package is missing" in check.detail
    assert "instead of 0.1" in check.detail
    assert "make" in check.fix


def test_hashes_and_local_labels_are_parsed(tmp_path):
    import torch

    release = torch.__version__.split("+")[0]
    (tmp_path / "a.lock").write_text(f"torch=={release} --hash=sha256:00\n")
    assert doctor.check_locked_versions(tmp_path).status is CheckStatus.OK
    (tmp_path / "a.lock").write_text(f"torch=={release}+other\n")
    assert doctor.check_locked_versions(tmp_path).status is CheckStatus.FAILED


def test_gpu_lock_is_compared_only_with_the_cuda_build(tmp_path, monkeypatch):
    (tmp_path / "cpu.lock").write_text("numpy==0.1\n")
    (tmp_path / "gpu.lock").write_text("numpy==0.2\nvllm==0.32.0\n")
    assert "instead of 0.1" in doctor.check_locked_versions(tmp_path).detail
    packages = [SimpleNamespace(name="vllm", version="0.32.0"), SimpleNamespace(name="numpy", version="0.3")]
    monkeypatch.setattr(doctor.importlib.metadata, "distributions", lambda: packages)
    check = doctor.check_locked_versions(tmp_path)
    assert check.detail == "numpy 0.3 instead of 0.2"
    assert "requirements/gpu.lock" in check.fix


def test_missing_lock_files_are_a_warning(tmp_path):
    assert doctor.check_locked_versions(tmp_path).status is CheckStatus.WARNING


def test_failed_engine_import_shows_the_error(monkeypatch):
    monkeypatch.setitem(doctor.ENGINE_IMPORTS, "deepspeed", "import no_such_engine as m")
    check = doctor.check_engine_import("deepspeed")
    assert check.status is CheckStatus.FAILED
    assert check.detail == "ModuleNotFoundError: No module named 'no_such_engine'"


def test_slow_engine_import_is_no_reason_to_reinstall(monkeypatch):
    monkeypatch.setitem(doctor.ENGINE_IMPORTS, "vllm", "import time; time.sleep(600); import av as m")
    monkeypatch.setattr(doctor, "IMPORT_TIMEOUT_S", 0.5)
    check = doctor.check_engine_import("vllm")
    assert (check.status, check.detail) == (CheckStatus.FAILED, "the import took longer than 0.5 s")
    assert check.fix == "the machine is busy: stop other programs, then repeat the check"


def test_missing_bytecode_is_a_warning_with_a_fix(tmp_path, monkeypatch):
    (tmp_path / "large_package.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    check = doctor.check_bytecode("large_package")
    assert (check.status, "unset PYTHONDONTWRITEBYTECODE" in check.fix) == (CheckStatus.WARNING, True)
    py_compile.compile(str(tmp_path / "large_package.py"))
    assert doctor.check_bytecode("large_package").status is CheckStatus.OK
    assert doctor.check_bytecode("no_such_package").detail == "no_such_package is not installed"


def test_hung_child_process_times_out():
    ok, output = doctor._run_python("import time; time.sleep(600)", 1)
    assert (ok, output) == (False, "no answer within 1 s")


def test_video_round_trip_passes():
    assert doctor.check_video_round_trip().status is CheckStatus.OK


def test_ray_start_leaves_nothing_behind(monkeypatch):
    folders: list[str] = []
    mkdtemp = doctor.tempfile.mkdtemp
    monkeypatch.setattr(doctor.tempfile, "mkdtemp", lambda prefix: folders.append(mkdtemp(prefix=prefix)) or folders[0])
    check = doctor.check_ray_start()
    assert check.status is CheckStatus.OK, check.detail
    assert not Path(folders[0]).exists()
    commands = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if folders[0] in command]


def test_failed_ray_start_is_a_failure(monkeypatch, tmp_path):
    blocking_file = tmp_path / "file"
    blocking_file.write_text("")
    monkeypatch.setattr(doctor.tempfile, "mkdtemp", lambda prefix: str(blocking_file / "x"))
    check = doctor.check_ray_start()
    assert check.status is CheckStatus.FAILED
    assert check.fix


def test_ray_address_in_the_environment_is_a_warning(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check = doctor.check_other_ray()
    assert check.status is CheckStatus.WARNING
    assert "RAY_ADDRESS is 10.0.0.1:6379" in check.detail


@pytest.mark.parametrize(
    "check",
    [doctor.check_memory, doctor.check_shared_memory, lambda needed: doctor.check_disk(Path("a/b"), needed)],
)
def test_too_little_space_is_a_failure(check):
    assert check(0.0).status is CheckStatus.OK
    short = check(1e9)
    assert short.status is CheckStatus.FAILED
    assert "1e+09 GiB needed" in short.detail


def test_missing_shared_memory_is_a_failure(tmp_path):
    assert doctor.check_shared_memory(0.0, tmp_path / "shm").status is CheckStatus.FAILED


def test_container_limits_apply(monkeypatch):
    limits = {"memory.max": "3221225472\n", "memory.current": "2147483648\n", "cpu.max": "100000 100000\n"}
    monkeypatch.setattr(doctor, "_read_cgroup_file", lambda name: limits[name])
    assert doctor.check_memory(2.0).detail == "1.0 GiB free, 2 GiB needed"
    assert doctor.check_cores().detail == "1 usable"
    assert doctor.check_cores().status is CheckStatus.FAILED


def test_require_checks_raises_the_first_failure():
    passed = CheckResult("cores", CheckStatus.OK, "2 usable")
    failed = CheckResult("memory", CheckStatus.FAILED, "1.0 GiB free, 6 GiB needed", "close other programs")
    checks.require_checks(passed)
    with pytest.raises(UserError, match=r"memory: 1\.0 GiB free, 6 GiB needed; close other programs"):
        checks.require_checks(passed, failed)


def test_table_shows_the_fix_of_a_failure():
    console = Console(width=80)
    with console.capture() as capture:
        console.print(
            checks.check_table([CheckResult("memory", CheckStatus.FAILED, "1 GiB free", "close other programs")])
        )
    assert "failed  memory  1 GiB free" in capture.get()
    assert "-> close other programs" in capture.get()
