"""Run a command of the command line in the test process."""

from __future__ import annotations

import sys

import pytest

from vz_ray import cli


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run `vz-ray` with these arguments and return its exit code. Errors of the user are one line on stderr."""
    monkeypatch.delenv("VZ_RAY_DEBUG", raising=False)
    monkeypatch.setattr(sys, "argv", ["vz-ray", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    return int(exit_info.value.code or 0)
