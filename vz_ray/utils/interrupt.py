"""Clean stop on SIGINT and SIGTERM. A second signal kills the process."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Coroutine
from types import FrameType, TracebackType
from typing import Any, TypeVar

SIGNALS = (signal.SIGINT, signal.SIGTERM)
POLL_INTERVAL_S = 0.2

T = TypeVar("T")


def restore_signal_handlers() -> None:
    """Reinstall the signal handlers that Python knows, after a library replaced them in C.

    Ray's core catches SIGTERM to print a stack, and aborts the process three seconds later.
    Does nothing outside the main thread.
    """
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if (handler := signal.getsignal(number)) is not None:
                signal.signal(number, handler)


RESUME_HINT = "the same command resumes from the last checkpoint"


class StopRequested(Exception):
    """The run was asked to stop. Work after the last checkpoint is repeated on resume."""

    def __init__(self, message: str, resume_hint: str = RESUME_HINT) -> None:
        super().__init__(message)
        self.resume_hint = resume_hint


def describe_saved(steps: int) -> str:
    """Return what a stopped run has saved, as part of its message.

    Example: `describe_saved(1)` -> `"saved the run after 1 step"`
    """
    return f"saved the run after {steps} step{'s' if steps > 1 else ''}" if steps else "no step was completed"


class StepStopped(Exception):
    """A training step was dropped because a stop was requested; the weights are those before the step."""


class Interrupt:
    """Context manager: the first SIGINT or SIGTERM sets `requested`, the second kills the process.

    Enter it in the main thread; `raise_if_requested` may be called from any thread.

    Example:
        with Interrupt() as interrupt:
            for step in steps:
                interrupt.raise_if_requested()
                train(step)
    """

    def __init__(self, resume_hint: str = RESUME_HINT) -> None:
        self._resume_hint = resume_hint
        self._event = threading.Event()
        self._signal_name = ""
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        self._previous = {number: signal.getsignal(number) for number in SIGNALS}
        self._install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None means that the handler was not installed from Python and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]

    @property
    def reason(self) -> str:
        """The signal that requested the stop, as part of a message."""
        return f"stopped by {self._signal_name}"

    @property
    def requested(self) -> bool:
        """Whether a stop was requested. Also reinstalls the handlers if a library replaced them.

        `signal.getsignal` does not report handlers that were installed in C.
        """
        if threading.current_thread() is threading.main_thread() and not self._event.is_set():
            self._install()
        return self._event.is_set()

    def raise_if_requested(self) -> None:
        """Raise `StopRequested` if a stop was requested."""
        if self.requested:
            raise StopRequested(self.reason, self._resume_hint)

    async def wait_requested(self) -> None:
        """Wait until a stop is requested."""
        while not self.requested:  # noqa: ASYNC110 - a signal handler cannot set an asyncio event
            await asyncio.sleep(POLL_INTERVAL_S)

    async def run_interruptible(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`; on a stop request, cancel it and raise `StopRequested`."""
        task = asyncio.create_task(work)
        try:
            while not task.done():
                self.raise_if_requested()
                await asyncio.wait({task}, timeout=POLL_INTERVAL_S)
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._event.is_set():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._signal_name = signal.Signals(number).name
        self._event.set()
