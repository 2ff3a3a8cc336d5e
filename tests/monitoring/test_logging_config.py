"""Log files of the driver, and redirected output."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from vz_ray.monitoring import logging_config

pytestmark = pytest.mark.usefixtures("restored_loggers")


def test_engine_records_have_their_own_file(tmp_path, capsys, monkeypatch):
    for name in logging_config.QUIET_ENV:
        monkeypatch.setenv(name, os.environ.get(name, ""))
    logging_config.configure_logging(tmp_path)
    logging.getLogger("vllm.engine").warning("cache is full")
    logging.getLogger("vz_ray.training.loop").info("step 1")
    logging.getLogger("vz_ray.training.loop").warning("mismatch 0.2")
    assert "cache is full" in (tmp_path / "engines.log").read_text()
    assert "step 1" in (tmp_path / "vz_ray.log").read_text()
    assert capsys.readouterr().err == "WARNING: mismatch 0.2\n"


def test_redirected_output_includes_c_code_and_children(tmp_path):
    # In a child process, because pytest replaces stdout.
    code = f"""
import os, pathlib
from vz_ray.monitoring.logging_config import redirect_output
print("before")
redirect_output(pathlib.Path({str(tmp_path / "logs" / "worker.log")!r}))
print("python", flush=True)
os.write(2, b"c code\\n")
os.system("echo from a child")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr, result.returncode) == ("before\n", "", 0)
    assert (tmp_path / "logs" / "worker.log").read_text() == "python\nc code\nfrom a child\n"
