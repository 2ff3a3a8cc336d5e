from __future__ import annotations

import py_compile
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from vz_ray import doctor
from vz_ray.observe import checks
from vz_ray.observe.checks import Check, Verdict
from vz_ray.observe.errors import UserError


def test_this_environment_is_as_locked():
    assert doctor.locked_versions().verdict is Verdict.OK, doctor.locked_versions().found


def test_copies_that_setuptools_carries_do_not_count():
    import setuptools

    assert setuptools.__version__
    assert doctor.locked_versions().verdict is Verdict.OK, doctor.locked_versions().found


def test_versions_that_differ_and_packages_that_lack_are_named(tmp_path):
    (tmp_path / "cpu.lock").write_text("# comment\nnumpy==0.1\nno-such-package==1.0\n")
    check = doctor.locked_versions(tmp_path)
    assert check.verdict is Verdict.PROBLEM
    assert "no-such-package is missing" in check.found
    assert "instead of 0.1" in check.found
    assert "make" in check.fix


def test_hashes_and_local_labels_are_understood(tmp_path):
    import torch

    release = torch.__version__.split("+")[0]
    (tmp_path / "a.lock").write_text(f"torch=={release} --hash=sha256:00\n")
    assert doctor.locked_versions(tmp_path).verdict is Verdict.OK
    (tmp_path / "a.lock").write_text(f"torch=={release}+other\n")
    assert doctor.locked_versions(tmp_path).verdict is Verdict.PROBLEM


def test_without_lock_files_there_is_nothing_to_compare(tmp_path):
    assert doctor.locked_versions(tmp_path).verdict is Verdict.NOTE


def test_an_engine_that_cannot_be_imported_says_why(monkeypatch):
    monkeypatch.setitem(doctor.ENGINES, "deepspeed", "import no_such_engine as m")
    check = doctor.engine_imports("deepspeed")
    assert check.verdict is Verdict.PROBLEM
    assert check.found == "ModuleNotFoundError: No module named 'no_such_engine'"


def test_bytecode_that_is_not_kept_is_noted_with_a_way_out(tmp_path, monkeypatch):
    (tmp_path / "large_package.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    check = doctor.bytecode("large_package")
    assert (check.verdict, "unset PYTHONDONTWRITEBYTECODE" in check.fix) == (Verdict.NOTE, True)
    py_compile.compile(str(tmp_path / "large_package.py"))
    assert doctor.bytecode("large_package").verdict is Verdict.OK
    assert doctor.bytecode("no_such_package").found == "no_such_package is not installed"


def test_a_child_that_hangs_is_given_up():
    works, found = doctor._run("import time; time.sleep(600)", 1)
    assert (works, found) == (False, "no answer within 1 s")


def test_a_video_is_encoded_and_decoded_here():
    assert doctor.video_round_trip().verdict is Verdict.OK


def test_ray_starts_here_and_leaves_nothing_behind(monkeypatch):
    made: list[str] = []
    make = doctor.tempfile.mkdtemp
    monkeypatch.setattr(
        doctor.tempfile, "mkdtemp", lambda prefix: made.append(make(prefix=prefix)) or made[0]
    )
    check = doctor.ray_starts()
    assert check.verdict is Verdict.OK, check.found
    assert not Path(made[0]).exists()
    commands = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if made[0] in command]


def test_ray_that_cannot_start_is_a_problem(monkeypatch, tmp_path):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setattr(doctor.tempfile, "mkdtemp", lambda prefix: str(in_the_way / "x"))
    check = doctor.ray_starts()
    assert check.verdict is Verdict.PROBLEM
    assert check.fix


def test_a_ray_address_in_the_environment_is_said_but_no_problem(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check = doctor.other_ray()
    assert check.verdict is Verdict.NOTE
    assert "RAY_ADDRESS is 10.0.0.1:6379" in check.found


@pytest.mark.parametrize(
    "check", [doctor.memory, doctor.shared_memory, lambda n: doctor.disk(Path("a/b"), n)]
)
def test_too_little_room_is_a_problem_and_enough_is_not(check):
    assert check(0.0).verdict is Verdict.OK
    short = check(1e9)
    assert short.verdict is Verdict.PROBLEM
    assert "1e+09 GiB needed" in short.found


def test_shared_memory_that_is_not_there_is_a_problem(tmp_path):
    assert doctor.shared_memory(0.0, tmp_path / "shm").verdict is Verdict.PROBLEM


def test_a_container_limit_counts_as_memory_and_cores(monkeypatch):
    limits = {"memory.max": "3221225472\n", "memory.current": "2147483648\n", "cpu.max": "100000 100000\n"}
    monkeypatch.setattr(doctor, "_cgroup", lambda file: limits[file])
    assert doctor.memory(2.0).found == "1.0 GiB free, 2 GiB needed"
    assert doctor.cores().found == "1 usable"
    assert doctor.cores().verdict is Verdict.PROBLEM


def test_what_is_required_fails_with_the_first_problem_in_one_line():
    fine = Check("cores", Verdict.OK, "2 usable")
    short = Check("memory", Verdict.PROBLEM, "1.0 GiB free, 6 GiB needed", "close other programs")
    checks.require(fine)
    with pytest.raises(UserError, match=r"memory: 1\.0 GiB free, 6 GiB needed; close other programs"):
        checks.require(fine, short)


def test_the_table_shows_the_fix_of_a_problem():
    console = Console(width=80)
    with console.capture() as shown:
        console.print(checks.table([Check("memory", Verdict.PROBLEM, "1 GiB free", "close other programs")]))
    assert "problem  memory  1 GiB free" in shown.get()
    assert "-> close other programs" in shown.get()
