"""A process that cannot answer still says where it is; one that cannot even do that is not waited for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from vz_ray.utils.stack_dump import (
    StackDumper,
    StackDumpError,
    dump_stacks,
    innermost_package_frame,
    install_stack_dumper,
)

STUCK = """
import ctypes, threading
from vz_ray.utils.stack_dump import arm

def wait_for_a_peer():
    print(armed.pid, armed.descriptor, armed.name, flush=True)
    while True:
        ctypes.PyDLL(None).sleep(600)  # holds the interpreter's lock; a signal ends it

armed = arm()
threading.Thread(target=threading.Event().wait, daemon=True).start()
wait_for_a_peer()
"""


@pytest.fixture
def stuck() -> Iterator[tuple[subprocess.Popen[str], StackDumper]]:
    """A process in C code that never returns and lets no other Python thread run."""
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        pid, descriptor, name = process.stdout.readline().split()
        yield process, StackDumper(int(pid), int(descriptor), name)
    finally:
        process.kill()
        process.communicate()


def test_a_process_stuck_in_c_code_says_where_as_often_as_it_is_asked(stuck) -> None:
    _, armed = stuck
    for _ in range(2):
        state, stacks = dump_stacks(armed)
        assert state == "in none of our code"
        assert stacks.count("wait_for_a_peer") == 1
        assert stacks.count("hread 0x") == 2


def test_a_stopped_process_is_said_to_be_stopped(stuck) -> None:
    process, armed = stuck
    process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(
        StackDumpError, match=rf"process {armed.pid} \(stopped\) wrote no stacks within 0.5 s"
    ):
        dump_stacks(armed, timeout_s=0.5)
    assert time.monotonic() - began < 2


def test_a_process_that_has_ended_is_said_to_be_gone(stuck) -> None:
    process, armed = stuck
    process.kill()
    process.wait()
    with pytest.raises(StackDumpError, match=f"process {armed.pid} is gone"):
        dump_stacks(armed)


def test_another_process_of_the_same_number_is_not_signalled() -> None:
    """SIGUSR1 ends a process that does not expect it."""
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True)
    try:
        with pytest.raises(StackDumpError, match="another one has its number"):
            dump_stacks(StackDumper(bystander.pid, 0, install_stack_dumper().name))
        bystander.communicate("\n", timeout=20)
        assert bystander.returncode == 0
    finally:
        bystander.kill()


def test_the_innermost_own_frame_is_told_from_others_and_from_waits() -> None:
    armed = install_stack_dumper()
    package = os.path.dirname(
        os.path.dirname(os.path.abspath(sys.modules[StackDumper.__module__].__file__ or ""))
    )
    stacks = (
        "Thread 0x01 (most recent call first):\n"
        f'  File "{package}/learner/rank.py", line 1 in a_thread_beside_it\n'
        "\n"
        "Current thread 0x02 (most recent call first):\n"
        '  File "/somewhere/vz_ray/.venv/torch/distributed.py", line 2 in all_reduce\n'
        f'  File "{package}/observe/deadline.py", line 3 in within\n'
        f'  File "{package}/learner/trainer.py", line 4 in _update\n'
        f'  File "{package}/learner/rank.py", line 5 in grpo_step\n'
    )
    assert innermost_package_frame(stacks) == "_update (vz_ray/learner/trainer.py:4)"
    assert innermost_package_frame(stacks.replace(package, "/elsewhere")) == ""
    assert "in none of our code" in dump_stacks(replace(armed, pid=os.getpid()))[0]
