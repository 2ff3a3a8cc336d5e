from __future__ import annotations

import py_compile
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from vz_ray.jobs import doctor
from vz_ray.monitoring import checks
from vz_ray.monitoring.checks import CheckResult, CheckStatus
from vz_ray.utils.errors import UserError


def test_this_environment_is_as_locked():
    assert doctor.check_locked_versions().status is CheckStatus.OK, doctor.check_locked_versions().detail


def test_copies_that_setuptools_carries_do_not_count():
    import setuptools

    assert setuptools.__version__
    assert doctor.check_locked_versions().status is CheckStatus.OK, doctor.check_locked_versions().detail


def test_versions_that_differ_and_packages_that_lack_are_named(tmp_path):
    (tmp_path / "cpu.lock").write_text("# comment\nnumpy==0.1\nno-such-package==1.0\n")
    check = doctor.check_locked_versions(tmp_path)
    assert check.status is CheckStatus.FAILED
    assert "no-such-package is missing" in check.detail
    assert "instead of 0.1" in check.detail
    assert "make" in check.fix


def test_hashes_and_local_labels_are_understood(tmp_path):
    import torch

    release = torch.__version__.split("+")[0]
    (tmp_path / "a.lock").write_text(f"torch=={release} --hash=sha256:00\n")
    assert doctor.check_locked_versions(tmp_path).status is CheckStatus.OK
    (tmp_path / "a.lock").write_text(f"torch=={release}+other\n")
    assert doctor.check_locked_versions(tmp_path).status is CheckStatus.FAILED


def test_without_lock_files_there_is_nothing_to_compare(tmp_path):
    assert doctor.check_locked_versions(tmp_path).status is CheckStatus.WARNING


def test_an_engine_that_cannot_be_imported_says_why(monkeypatch):
    monkeypatch.setitem(doctor.ENGINE_IMPORTS, "deepspeed", "import no_such_engine as m")
    check = doctor.check_engine_import("deepspeed")
    assert check.status is CheckStatus.FAILED
    assert check.detail == "ModuleNotFoundError: No module named 'no_such_engine'"


def test_bytecode_that_is_not_kept_is_noted_with_a_way_out(tmp_path, monkeypatch):
    (tmp_path / "large_package.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    check = doctor.check_bytecode("large_package")
    assert (check.status, "unset PYTHONDONTWRITEBYTECODE" in check.fix) == (CheckStatus.WARNING, True)
    py_compile.compile(str(tmp_path / "large_package.py"))
    assert doctor.check_bytecode("large_package").status is CheckStatus.OK
    assert doctor.check_bytecode("no_such_package").detail == "no_such_package is not installed"


def test_a_child_that_hangs_is_given_up():
    works, found = doctor._run("import time; time.sleep(600)", 1)
    assert (works, found) == (False, "no answer within 1 s")


def test_a_video_is_encoded_and_decoded_here():
    assert doctor.check_video_round_trip().status is CheckStatus.OK


def test_ray_starts_here_and_leaves_nothing_behind(monkeypatch):
    made: list[str] = []
    make = doctor.tempfile.mkdtemp
    monkeypatch.setattr(
        doctor.tempfile, "mkdtemp", lambda prefix: made.append(make(prefix=prefix)) or made[0]
    )
    check = doctor.check_ray_start()
    assert check.status is CheckStatus.OK, check.detail
    assert not Path(made[0]).exists()
    commands = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if made[0] in command]


def test_ray_that_cannot_start_is_a_problem(monkeypatch, tmp_path):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setattr(doctor.tempfile, "mkdtemp", lambda prefix: str(in_the_way / "x"))
    check = doctor.check_ray_start()
    assert check.status is CheckStatus.FAILED
    assert check.fix


def test_a_ray_address_in_the_environment_is_said_but_no_problem(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check = doctor.check_other_ray()
    assert check.status is CheckStatus.WARNING
    assert "RAY_ADDRESS is 10.0.0.1:6379" in check.detail


@pytest.mark.parametrize(
    "check", [doctor.check_memory, doctor.check_shared_memory, lambda n: doctor.check_disk(Path("a/b"), n)]
)
def test_too_little_room_is_a_problem_and_enough_is_not(check):
    assert check(0.0).verdict is CheckStatus.OK
    short = check(1e9)
    assert short.verdict is CheckStatus.FAILED
    assert "1e+09 GiB needed" in short.found


def test_shared_memory_that_is_not_there_is_a_problem(tmp_path):
    assert doctor.check_shared_memory(0.0, tmp_path / "shm").status is CheckStatus.FAILED


def test_a_container_limit_counts_as_memory_and_cores(monkeypatch):
    limits = {"memory.max": "3221225472\n", "memory.current": "2147483648\n", "cpu.max": "100000 100000\n"}
    monkeypatch.setattr(doctor, "_cgroup", lambda file: limits[file])
    assert doctor.check_memory(2.0).detail == "1.0 GiB free, 2 GiB needed"
    assert doctor.check_cores().detail == "1 usable"
    assert doctor.check_cores().status is CheckStatus.FAILED


def test_what_is_required_fails_with_the_first_problem_in_one_line():
    fine = CheckResult("cores", CheckStatus.OK, "2 usable")
    short = CheckResult("memory", CheckStatus.FAILED, "1.0 GiB free, 6 GiB needed", "close other programs")
    checks.require_checks(fine)
    with pytest.raises(UserError, match=r"memory: 1\.0 GiB free, 6 GiB needed; close other programs"):
        checks.require_checks(fine, short)


def test_the_table_shows_the_fix_of_a_problem():
    console = Console(width=80)
    with console.capture() as shown:
        console.print(
            checks.check_table(
                [CheckResult("memory", CheckStatus.FAILED, "1 GiB free", "close other programs")]
            )
        )
    assert "problem  memory  1 GiB free" in shown.get()
    assert "-> close other programs" in shown.get()
