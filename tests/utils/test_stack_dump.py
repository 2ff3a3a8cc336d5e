"""Stack dumps of this process and of processes that no longer answer."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from vz_ray.utils import stack_dump
from vz_ray.utils.memory_file import MemoryFile
from vz_ray.utils.stack_dump import (
    StackDumper,
    StackDumpError,
    dump_stacks,
    format_stacks,
    innermost_package_frame,
    install_stack_dumper,
)

STUCK = """
import ctypes, threading
from vz_ray.utils.memory_file import MemoryFile
from vz_ray.utils.stack_dump import install_stack_dumper

def wait_for_a_peer():
    print(dumper.pid, dumper.output.descriptor, dumper.output.name, flush=True)
    while True:
        ctypes.PyDLL(None).sleep(600)  # holds the GIL; a signal interrupts it

dumper = install_stack_dumper()
threading.Thread(target=threading.Event().wait, daemon=True).start()
wait_for_a_peer()
"""


@pytest.fixture
def stuck() -> Iterator[tuple[subprocess.Popen[str], StackDumper]]:
    """A process blocked in C code that holds the GIL."""
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        pid, descriptor, name = process.stdout.readline().split()
        yield process, StackDumper(MemoryFile(int(pid), int(descriptor), name))
    finally:
        process.kill()
        process.communicate()


def test_process_stuck_in_c_code_can_be_dumped_repeatedly(stuck) -> None:
    _, dumper = stuck
    for _ in range(2):
        state, stacks = dump_stacks(dumper)
        assert state == "in code outside vz_ray"
        assert stacks.count("wait_for_a_peer") == 1
        assert stacks.count("hread 0x") == 2


def test_stopped_process_times_out_with_its_state(stuck) -> None:
    process, dumper = stuck
    process.send_signal(signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(StackDumpError, match=rf"process {dumper.pid} \(stopped\) wrote no stacks within 0.5 s"):
        dump_stacks(dumper, timeout_s=0.5)
    assert time.monotonic() - start < 2


def test_ended_process_is_reported(stuck) -> None:
    process, dumper = stuck
    process.kill()
    process.wait()
    with pytest.raises(StackDumpError, match=f"process {dumper.pid} has ended"):
        dump_stacks(dumper)


def test_process_with_reused_id_is_not_signalled() -> None:
    """SIGUSR1 kills a process without a handler."""
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True)
    try:
        with pytest.raises(StackDumpError, match="another process has its id"):
            dump_stacks(StackDumper(MemoryFile(bystander.pid, 0, install_stack_dumper().output.name)))
        bystander.communicate("\n", timeout=20)
        assert bystander.returncode == 0
    finally:
        bystander.kill()


def test_innermost_package_frame_skips_other_code_and_waits() -> None:
    dumper = install_stack_dumper()
    package = os.path.dirname(os.path.dirname(os.path.abspath(stack_dump.__file__)))
    stacks = (
        "Thread 0x01 (most recent call first):\n"
        f'  File "{package}/learner/learner_actor.py", line 1 in another_thread\n'
        "\n"
        "Current thread 0x02 (most recent call first):\n"
        '  File "/somewhere/vz_ray/.venv/torch/distributed.py", line 2 in all_reduce\n'
        f'  File "{package}/utils/timeouts.py", line 3 in with_timeout\n'
        f'  File "{package}/learner/trainer.py", line 4 in _update\n'
        f'  File "{package}/learner/learner_actor.py", line 5 in grpo_step\n'
    )
    assert innermost_package_frame(stacks) == "_update (vz_ray/learner/trainer.py:4)"
    assert innermost_package_frame(stacks.replace(package, "/elsewhere")) == ""
    assert "in code outside vz_ray" in dump_stacks(replace(dumper, output=replace(dumper.output, pid=os.getpid())))[0]


def test_threads_are_listed_by_name_and_function() -> None:
    release = threading.Event()

    def wait_for_a_decoder() -> None:
        release.wait(30)

    thread = threading.Thread(target=wait_for_a_decoder, name="decode")
    thread.start()
    try:
        stacks = format_stacks()
    finally:
        release.set()
        thread.join()
    assert "thread decode:" in stacks
    assert "wait_for_a_decoder" in stacks
    assert "task" not in stacks


async def test_tasks_of_the_event_loop_are_listed() -> None:
    async def wait_for_an_engine() -> None:
        await asyncio.sleep(30)

    task = asyncio.create_task(wait_for_an_engine(), name="episode 7")
    await asyncio.sleep(0)
    stacks = format_stacks()
    task.cancel()
    assert "task episode 7:" in stacks
    assert "wait_for_an_engine" in stacks
