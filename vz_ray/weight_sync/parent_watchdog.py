"""No engine outlives the process that started it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

_watching = False


def exit_with_parent(poll_s: float = 1.0) -> None:
    """In a child process: kills it soon after its parent is gone, however that went.

    An engine's process whose parent was killed outright would otherwise keep its
    memory (and its GPU). Polls rather than asks the kernel for a signal, as that
    signal would already come when the parent's *thread* that started it ends.
    Does nothing in a process that multiprocessing did not start.
    """
    global _watching
    starter = multiprocessing.parent_process()
    if _watching or starter is None:
        return
    _watching = True
    parent = os.getppid()

    def watch() -> None:
        # The starter may be gone before this process asks for its parent for the first time.
        while os.getppid() == parent and starter.is_alive():
            time.sleep(poll_s)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="exit-with-parent", daemon=True).start()
