"""Exit codes and messages of the command line."""

from __future__ import annotations

import json
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


def test_unknown_option_has_exit_code_2(monkeypatch, capsys):
    assert run_command(monkeypatch, "doctor", "--jsonn") == 2
    assert "--jsonn" in capsys.readouterr().err


def test_version_is_printed(monkeypatch, capsys):
    assert run_command(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == "0.1.0\n"
