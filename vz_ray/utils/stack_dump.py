"""Stacks of Python processes: of this process, and of a process that no longer answers.

process itself      install_stack_dumper() -> StackDumper, sent to its observers
same machine        dump_stacks(dumper): send SIGUSR1, read the stacks that the process wrote
"""

from __future__ import annotations

import asyncio
import faulthandler
import io
import os
import re
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import psutil

from vz_ray.utils.memory_file import MemoryFile, ProcessEndedError

DUMP_TIMEOUT_S = 5.0
"""Maximum time for writing the stacks; it usually takes milliseconds."""
_POLL_INTERVAL_S = 0.1
_MAX_FRAMES = 12
_PACKAGE = Path(__file__).resolve().parent.parent
_WAITING_PACKAGES = (_PACKAGE / "utils", _PACKAGE / "monitoring")
"""Frames of these packages wait for other code and do not show what the process does."""
_FRAME = re.compile(r'  File "(.+)", line (\d+) in (.+)')


@dataclass(frozen=True, slots=True)
class StackDumper:
    """Handle of a process that writes the stacks of all its threads to `output` on SIGUSR1."""

    output: MemoryFile

    @property
    def pid(self) -> int:
        return self.output.pid


class StackDumpError(RuntimeError):
    """The stacks of a process are not available; the message gives the reason."""


def install_stack_dumper() -> StackDumper:
    """Register a SIGUSR1 handler that dumps the stacks of all threads of this process.

    `faulthandler` runs it even while a thread is blocked in C code. The output goes to memory, so a hung
    disk does not block the dump.
    """
    output = MemoryFile.create("stacks")
    faulthandler.register(signal.SIGUSR1, file=output.descriptor, all_threads=True)
    return StackDumper(output)


def dump_stacks(dumper: StackDumper, timeout_s: float = DUMP_TIMEOUT_S) -> tuple[str, str]:
    """Return a one-line state of a process on this machine, and the stacks of its threads.

    Raises:
        StackDumpError: The process has ended, or wrote nothing within `timeout_s`, for example because
            it is stopped.
    """
    stacks = _request_stacks(dumper, timeout_s)
    return f"in {innermost_package_frame(stacks) or 'code outside vz_ray'}", stacks


def innermost_package_frame(stacks: str) -> str:
    """Return the innermost frame of vz_ray in a `faulthandler` dump, or an empty string.

    The thread that runs Python's signal handlers is searched first. Frames in `utils` and `monitoring` are skipped.

    Example: `_update (vz_ray/learner/trainer.py:244)`
    """
    threads = stacks.split("\n\n")
    for thread in sorted(threads, key=lambda lines: not lines.startswith("Current")):
        for file, line, function in _FRAME.findall(thread):
            path = Path(file)
            if path.is_relative_to(_PACKAGE) and not any(map(path.is_relative_to, _WAITING_PACKAGES)):
                return f"{function} ({path.relative_to(_PACKAGE.parent)}:{line})"
    return ""


def format_stacks() -> str:
    """Return the stacks of all other threads of this process and, inside an event loop, of its other tasks."""
    output = io.StringIO()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            print(f"thread {names.get(ident, ident)}:", file=output)
            traceback.print_stack(frame, limit=-_MAX_FRAMES, file=output)
    try:
        tasks = asyncio.all_tasks()
    except RuntimeError:
        return output.getvalue()
    for task in tasks - {asyncio.current_task()}:
        print(f"task {task.get_name()}:", file=output)
        task.print_stack(limit=_MAX_FRAMES, file=output)
    return output.getvalue()


def _request_stacks(dumper: StackDumper, timeout_s: float) -> str:
    try:
        file = dumper.output.open("rb")
    except ProcessEndedError as error:
        raise StackDumpError(str(error)) from error
    with file:
        start = size = file.seek(0, os.SEEK_END)
        deadline = time.monotonic() + timeout_s
        os.kill(dumper.pid, signal.SIGUSR1)
        while time.monotonic() < deadline:
            time.sleep(_POLL_INTERVAL_S)
            previous_size, size = size, os.fstat(file.fileno()).st_size
            if start < previous_size == size:
                break
        if size == start:
            state = psutil.Process(dumper.pid).status()
            raise StackDumpError(f"process {dumper.pid} ({state}) wrote no stacks within {timeout_s:g} s")
        file.seek(start)
        return file.read().decode(errors="replace")
