"""What a process is doing that cannot answer, as it may be stuck in C code: asked by a signal.

the process itself    arm() -> Armed, which others are told
on its machine        whereabouts(armed): signals it, and reads the stacks that it wrote
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil

DUMP_TIMEOUT_S = 5.0
"""How long writing stacks may take; a process that can do so takes milliseconds."""
_POLL_S = 0.1
_PACKAGE = Path(__file__).resolve().parent.parent
_FRAME = re.compile(r'  File "(.+)", line (\d+) in (.+)')


@dataclass(frozen=True, slots=True)
class StackDumper:
    """A process that writes the stacks of all its threads when it gets SIGUSR1.

    Attributes:
        pid: Its number on its machine.
        descriptor: Of the file, in that process; it is in no directory, and goes with the process.
        name: Of the file, like no other: tells the process from a later one of the same number.
    """

    pid: int
    descriptor: int
    name: str


class StackDumpError(RuntimeError):
    """The process does not say what it is doing; the message says why."""


def install_stack_dumper() -> StackDumper:
    """Makes this process one that can be asked.

    The handler is `faulthandler`'s: it runs at once, whatever the interpreter is in. It writes to
    memory, as a disk may be what the process waits for.
    """
    name = f"stacks-{uuid.uuid4().hex}"
    descriptor = os.memfd_create(name)
    faulthandler.register(signal.SIGUSR1, file=descriptor, all_threads=True)
    return StackDumper(os.getpid(), descriptor, name)


def dump_stacks(process: StackDumper, timeout_s: float = DUMP_TIMEOUT_S) -> tuple[str, str]:
    """What a process of this machine is doing, in a few words, and the stacks of its threads.

    Raises:
        Silent: It is gone, or wrote nothing within `timeout_s`; a stopped process does not.
    """
    stacks = _written(process, timeout_s)
    return f"in {innermost_package_frame(stacks) or 'none of our code'}", stacks


def innermost_package_frame(stacks: str) -> str:
    """The innermost frame of this package, first in the thread that runs Python's signal handlers.

    Frames of `observe` only wait for others and do not count. Empty if there is none.

    Example: `_update (vz_ray/learner/trainer.py:244)`
    """
    threads = stacks.split("\n\n")
    for thread in sorted(threads, key=lambda lines: not lines.startswith("Current")):
        for file, line, function in _FRAME.findall(thread):
            path = Path(file)
            if path.is_relative_to(_PACKAGE) and not path.is_relative_to(_PACKAGE / "observe"):
                return f"{function} ({path.relative_to(_PACKAGE.parent)}:{line})"
    return ""


def _written(process: StackDumper, write_s: float) -> str:
    path = Path(f"/proc/{process.pid}/fd/{process.descriptor}")
    try:
        if process.name not in os.readlink(path):
            raise StackDumpError(f"process {process.pid} is gone, and another one has its number")
        file = path.open("rb")
    except OSError as error:
        raise StackDumpError(f"process {process.pid} is gone") from error
    with file:
        before = size = file.seek(0, os.SEEK_END)
        until = time.monotonic() + write_s
        os.kill(process.pid, signal.SIGUSR1)
        while time.monotonic() < until:
            time.sleep(_POLL_S)
            last, size = size, os.fstat(file.fileno()).st_size
            if before < last == size:
                break
        if size == before:
            state = psutil.Process(process.pid).status()
            raise StackDumpError(f"process {process.pid} ({state}) wrote no stacks within {write_s:g} s")
        file.seek(before)
        return file.read().decode(errors="replace")
