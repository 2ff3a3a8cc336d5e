"""An engine process exits after its parent dies, even if the parent died before the watchdog started."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from tests.small_run import ROOT, survivors

SOURCE = """
import multiprocessing, os, sys, time

def engine(start_after_s):
    time.sleep(start_after_s)
    from vz_ray.weight_sync.parent_watchdog import exit_with_parent
    exit_with_parent(0.1)
    print("watching", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    child = multiprocessing.get_context("fork").Process(target=engine, args=(float(sys.argv[1]),))
    child.start()
    print(child.pid, flush=True)
    child.join()
"""


@pytest.mark.parametrize("before_watchdog", [False, True])
def test_child_exits_after_parent_kill(before_watchdog: bool) -> None:
    command = [sys.executable, "-c", SOURCE, "2" if before_watchdog else "0"]
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    if not before_watchdog:
        assert parent.stdout.readline() == "watching\n"
    parent.kill()
    parent.wait()
    assert not survivors([child], 60)
    parent.stdout.close()
