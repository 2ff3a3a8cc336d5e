"""Watchdog that kills an engine process when its parent has died."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

_watching = False


def exit_with_parent(poll_s: float = 1.0) -> None:
    """Kill this child process soon after its parent process dies, for example by SIGKILL.

    Otherwise an orphaned engine would keep its memory and GPU. It polls, because the kernel's
    parent-death signal already fires when the parent's *thread* that started the child exits. No-op in
    processes not started by multiprocessing.
    """
    global _watching
    starter = multiprocessing.parent_process()
    if _watching or starter is None:
        return
    _watching = True
    parent = os.getppid()

    def watch() -> None:
        # The parent may have died before the first call of getppid().
        while os.getppid() == parent and starter.is_alive():
            time.sleep(poll_s)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="exit-with-parent", daemon=True).start()
