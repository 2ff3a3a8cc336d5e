"""What manifests say of a head, tried on Ray's real one on this machine (slow)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import psutil
import pytest

from cluster.hooks import JobApi
from tests.cluster.manifests import ROOT

PORT, DASHBOARD, AGENT, METRICS = 6431, 8431, 8432, 8433
TOKEN = "0123456789abcdef0123456789abcdef"
START_S = 90.0

# Ends only after longer than the 3 seconds that Ray gives a job by default.
JOB = """
import signal, sys, time
from pathlib import Path

def stop(*_):
    time.sleep(5)
    Path(sys.argv[1]).write_text("checkpoint")
    sys.exit(130)

signal.signal(signal.SIGTERM, stop)
Path(sys.argv[2]).touch()
time.sleep(600)
"""


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def ours(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if process.pid != os.getpid() and str(folder) in " ".join(process.info["cmdline"] or []):
            found += [process, *process.children(recursive=True)]
    return found


@pytest.fixture
def head() -> Iterator[JobApi]:
    """A head with the marker and without CPUs, and its token."""
    # Ray's sockets lie in it: pytest's own paths are too long.
    folder = Path(tempfile.gettempdir()) / f"vzh{time.time_ns() % 10**8}"
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--num-cpus=0",
        '--resources={"head": 1}',
        f"--port={PORT}",
        f"--dashboard-port={DASHBOARD}",
        f"--dashboard-agent-listen-port={AGENT}",
        f"--metrics-export-port={METRICS}",
        f"--temp-dir={folder}",
        "--node-ip-address=127.0.0.1",
        "--object-store-memory=134217728",
    ]
    subprocess.run(command, env=environment(), cwd=ROOT, check=True, capture_output=True, timeout=START_S)
    yield JobApi(f"http://127.0.0.1:{DASHBOARD}", TOKEN)
    found = ours(folder)
    for process in found:
        process.kill()
    psutil.wait_procs(found, timeout=10)
    shutil.rmtree(folder, ignore_errors=True)


def until(what: str, there) -> None:
    end = time.monotonic() + START_S
    while not there():
        assert time.monotonic() < end, f"{what}: not after {START_S:g} s"
        time.sleep(0.2)


def status(url: str) -> int:
    try:
        with urlopen(url, timeout=5) as answer:
            return answer.status
    except HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.mark.slow
def test_a_job_on_a_head_without_cpus_is_stopped_by_the_hook_and_has_time_for_its_checkpoint(
    head: JobApi, tmp_path: Path
):
    # Probes ask without a token; the job API does not answer without one.
    until("health", lambda: status(f"http://127.0.0.1:{AGENT}/api/healthz") == 200)
    until("dashboard", lambda: status(f"http://127.0.0.1:{DASHBOARD}/api/gcs_healthz") == 200)
    assert status(f"http://127.0.0.1:{DASHBOARD}/api/jobs/") in (401, 403)

    (tmp_path / "job.py").write_text(JOB)
    checkpoint, begun = tmp_path / "checkpoint", tmp_path / "begun"
    submit = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--no-wait"]
    submit += ["--address", f"http://127.0.0.1:{DASHBOARD}", "--submission-id", "one"]
    submit += ["--entrypoint-resources", '{"head": 0.001}', "--"]
    command = [sys.executable, str(tmp_path / "job.py"), str(checkpoint), str(begun)]
    subprocess.run([*submit, *command], env=environment(), check=True, capture_output=True, timeout=START_S)
    until("the job's begin", begun.exists)
    assert head.running_jobs() == ["one"]

    hook = [sys.executable, "-m", "cluster.hooks", "stop-jobs", "--seconds", "40"]
    hook += ["--dashboard", f"http://127.0.0.1:{DASHBOARD}"]
    done = subprocess.run(
        hook, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, "no jobs left" in done.stderr) == (0, True), done.stderr
    assert checkpoint.read_text() == "checkpoint"
    assert head.running_jobs() == []
