"""Where a process is at this moment: what to look at when someone waits for it too long."""

from __future__ import annotations

import asyncio
import io
import sys
import threading
import traceback

_DEEPEST = 12
"""Frames of each thread and task, the innermost ones."""


def format_stacks() -> str:
    """Stacks of all threads but this one and, inside an event loop, of its tasks."""
    out = io.StringIO()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            print(f"thread {names.get(ident, ident)}:", file=out)
            traceback.print_stack(frame, limit=-_DEEPEST, file=out)
    try:
        tasks = asyncio.all_tasks()
    except RuntimeError:
        return out.getvalue()
    for task in tasks - {asyncio.current_task()}:
        print(f"task {task.get_name()}:", file=out)
        task.print_stack(limit=_DEEPEST, file=out)
    return out.getvalue()
