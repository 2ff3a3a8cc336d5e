from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from vz_ray import cli
from vz_ray.jobs import doctor
from vz_ray.monitoring.checks import CheckResult, CheckStatus
from vz_ray.utils.errors import UserError
from vz_ray.utils.interrupt import StopRequested


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["vz-ray", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("verdict", "status"), [(CheckStatus.OK, 0), (CheckStatus.WARNING, 0), (CheckStatus.FAILED, 1)]
)
def test_doctor_as_json_ends_with_1_only_for_a_problem(monkeypatch, capsys, verdict, status):
    monkeypatch.setattr(
        doctor, "examine", lambda folder: [CheckResult("memory", verdict, str(folder), "fix")]
    )
    assert run(monkeypatch, "doctor", "--json", "--runs", "elsewhere") == status
    (row,) = json.loads(capsys.readouterr().out)
    assert row == {"name": "memory", "verdict": str(verdict), "found": "elsewhere", "fix": "fix"}


def raising(error: Exception):
    def examine(folder: Path) -> list[CheckResult]:
        raise error

    return examine


def test_an_error_that_the_user_can_mend_is_one_line_and_status_2(monkeypatch, capsys):
    monkeypatch.delenv("VZ_RAY_DEBUG", raising=False)
    monkeypatch.setattr(doctor, "examine", raising(UserError("no video at a.mp4")))
    assert run(monkeypatch, "doctor") == 2
    assert capsys.readouterr().err == "vz-ray: no video at a.mp4\n"


def test_debugging_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("VZ_RAY_DEBUG", "1")
    monkeypatch.setattr(doctor, "examine", raising(UserError("no video at a.mp4")))
    monkeypatch.setattr(sys, "argv", ["vz-ray", "doctor"])
    with pytest.raises(UserError):
        cli.main()


def test_a_requested_stop_says_how_to_go_on(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", raising(StopRequested("stopped by SIGINT")))
    assert run(monkeypatch, "doctor") == 130
    assert "goes on from the last checkpoint" in capsys.readouterr().err


def test_a_stop_of_what_goes_on_otherwise_says_so(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", raising(StopRequested("stopped by SIGINT", "begin anew")))
    assert run(monkeypatch, "doctor") == 130
    assert capsys.readouterr().err == "vz-ray: stopped by SIGINT; begin anew\n"


def test_an_unknown_option_is_status_2(monkeypatch, capsys):
    assert run(monkeypatch, "doctor", "--jsonn") == 2
    assert "--jsonn" in capsys.readouterr().err


def test_the_version_is_printed(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == "0.1.0\n"
