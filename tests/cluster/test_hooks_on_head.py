"""The stop-jobs hook on a real Ray head (slow)."""

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

# Takes longer to stop than Ray's default of 3 seconds.
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


def cluster_processes(folder: Path) -> list[psutil.Process]:
    processes = []
    for process in psutil.process_iter(["cmdline"]):
        if process.pid != os.getpid() and str(folder) in " ".join(process.info["cmdline"] or []):
            processes += [process, *process.children(recursive=True)]
    return processes


@pytest.fixture
def head() -> Iterator[JobApi]:
    """Job API of a head without CPUs, with the `head` resource and a token."""
    # Contains socket paths; pytest's paths are too long.
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
    processes = cluster_processes(folder)
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=10)
    shutil.rmtree(folder, ignore_errors=True)


def wait_until(name: str, condition) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < deadline, f"{name}: not within {START_S:g} s"
        time.sleep(0.2)


def status(url: str) -> int:
    try:
        with urlopen(url, timeout=5) as response:
            return response.status
    except HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.mark.slow
def test_stop_jobs_waits_for_the_checkpoint_of_a_job(head: JobApi, tmp_path: Path):
    # Probes need no token; the job API does.
    wait_until("health", lambda: status(f"http://127.0.0.1:{AGENT}/api/healthz") == 200)
    wait_until("dashboard", lambda: status(f"http://127.0.0.1:{DASHBOARD}/api/gcs_healthz") == 200)
    assert status(f"http://127.0.0.1:{DASHBOARD}/api/jobs/") in (401, 403)

    (tmp_path / "job.py").write_text(JOB)
    checkpoint, started = tmp_path / "checkpoint", tmp_path / "started"
    submit = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--no-wait"]
    submit += ["--address", f"http://127.0.0.1:{DASHBOARD}", "--submission-id", "one"]
    submit += ["--entrypoint-resources", '{"head": 0.001}', "--"]
    command = [sys.executable, str(tmp_path / "job.py"), str(checkpoint), str(started)]
    subprocess.run([*submit, *command], env=environment(), check=True, capture_output=True, timeout=START_S)
    wait_until("job start", started.exists)
    assert head.running_jobs() == ["one"]

    hook = [sys.executable, "-m", "cluster.hooks", "stop-jobs", "--seconds", "40"]
    hook += ["--dashboard", f"http://127.0.0.1:{DASHBOARD}"]
    result = subprocess.run(hook, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, "all jobs ended" in result.stderr) == (0, True), result.stderr
    assert checkpoint.read_text() == "checkpoint"
    assert head.running_jobs() == []
