"""Exit codes and messages of the command line."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import run_command
from vz_ray import cli
from vz_ray.jobs import doctor
from vz_ray.monitoring.checks import CheckResult, CheckStatus
from vz_ray.utils.errors import UserError
from vz_ray.utils.interrupt import StopRequested
from vz_ray.utils.ports import find_free_port


def checks_that_raise(error: Exception) -> Callable[[Path], list[CheckResult]]:
    def run_checks(folder: Path) -> list[CheckResult]:
        raise error

    return run_checks


@pytest.mark.parametrize(
    ("status", "exit_code"), [(CheckStatus.OK, 0), (CheckStatus.WARNING, 0), (CheckStatus.FAILED, 1)]
)
def test_doctor_exits_with_1_only_for_a_failed_check(monkeypatch, capsys, status, exit_code):
    monkeypatch.setattr(doctor, "run_checks", lambda folder: [CheckResult("memory", status, str(folder), "fix")])
    assert run_command(monkeypatch, "doctor", "--json", "--runs", "elsewhere") == exit_code
    (row,) = json.loads(capsys.readouterr().out)
    assert row == {"name": "memory", "status": str(status), "detail": "elsewhere", "fix": "fix"}


def test_user_error_is_one_line_with_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "run_checks", checks_that_raise(UserError("no video at a.mp4")))
    assert run_command(monkeypatch, "doctor") == 2
    assert capsys.readouterr().err == "vz-ray: no video at a.mp4\n"


def test_debug_mode_raises_user_error(monkeypatch):
    monkeypatch.setenv("VZ_RAY_DEBUG", "1")
    monkeypatch.setattr(doctor, "run_checks", checks_that_raise(UserError("no video at a.mp4")))
    monkeypatch.setattr(sys, "argv", ["vz-ray", "doctor"])
    with pytest.raises(UserError):
        cli.main()


def test_stop_request_prints_how_to_resume(monkeypatch, capsys):
    error = StopRequested("stopped by SIGINT")
    monkeypatch.setattr(doctor, "run_checks", checks_that_raise(error))
    assert run_command(monkeypatch, "doctor") == 130
    assert capsys.readouterr().err == f"vz-ray: stopped by SIGINT; {error.resume_hint}\n"


def test_stop_request_prints_its_own_hint(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "run_checks", checks_that_raise(StopRequested("stopped by SIGINT", "start again")))
    assert run_command(monkeypatch, "doctor") == 130
    assert capsys.readouterr().err == "vz-ray: stopped by SIGINT; start again\n"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "No space left on device; free some space, or use another directory"),
        (errno.EROFS, "Read-only file system; use another directory"),
        (errno.EACCES, "Permission denied; change its permissions, or use another directory"),
        (errno.ENAMETOOLONG, "File name too long; use a shorter path"),
    ],
)
def test_unusable_file_is_one_line_with_exit_code_1(monkeypatch, capsys, code, message):
    error = OSError(code, os.strerror(code), "out/model.safetensors")
    monkeypatch.setattr(doctor, "run_checks", checks_that_raise(error))
    assert run_command(monkeypatch, "doctor") == 1
    assert capsys.readouterr().err == f"vz-ray: out/model.safetensors: {message}\n"


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken", "a"), OSError(errno.EPERM, "no file is named")])
def test_other_os_error_keeps_its_traceback(monkeypatch, error):
    monkeypatch.setattr(doctor, "run_checks", checks_that_raise(error))
    monkeypatch.setattr(sys, "argv", ["vz-ray", "doctor"])
    with pytest.raises(OSError, match=error.strerror) as caught:
        cli.main()
    assert caught.value is error


def test_directory_below_a_file_is_refused(monkeypatch, capsys, tmp_path):
    """Stands in for a read-only directory, which the root user of a container may write."""
    (tmp_path / "file").write_text("")
    assert run_command(monkeypatch, "synth", f"directory={tmp_path / 'file/data'}") == 1
    err = capsys.readouterr().err
    assert err.startswith(f"vz-ray: {tmp_path}/file/")
    assert err.endswith(": Not a directory; use another path\n")


def test_drain_without_a_cluster_is_refused_at_once(monkeypatch, capsys):
    address = f"127.0.0.1:{find_free_port('127.0.0.1')}"
    assert run_command(monkeypatch, "drain", "--address", address) == 2
    assert capsys.readouterr().err == (
        f"vz-ray: cannot join Ray at {address}: connection failed (Connection refused); "
        "give the address of a running cluster with --address HEAD:6379\n"
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["base", "--out", "model", "--steps", "-3"], "greater than or equal to 0"),
        (["base", "--out", "model", "--threads", "0"], "greater than or equal to 1"),
        (["synth", "train=-3"], "train is -3; it must be finite and not negative"),
        (["synth", "crf=52"], "crf is 52; it must be between 0 and 51"),
    ],
)
def test_number_out_of_range_is_refused(monkeypatch, capsys, tmp_path, command, message):
    monkeypatch.chdir(tmp_path)
    assert run_command(monkeypatch, *command) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_unknown_option_has_exit_code_2(monkeypatch, capsys):
    assert run_command(monkeypatch, "doctor", "--jsonn") == 2
    assert "--jsonn" in capsys.readouterr().err


def test_version_is_printed(monkeypatch, capsys):
    assert run_command(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == "0.1.0\n"
