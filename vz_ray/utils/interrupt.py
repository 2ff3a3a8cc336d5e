"""Ctrl-C and SIGTERM ask for a clean stop; a second one kills."""

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
    """Puts back the handlers that Python knows, whatever a library has set below it since.

    Ray's core catches SIGTERM to print a stack, and aborts the process three
    seconds later. Does nothing outside the main thread.
    """
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if (handler := signal.getsignal(number)) is not None:
                signal.signal(number, handler)


RESUME_HINT = "the same command goes on from the last checkpoint"


class StopRequested(Exception):
    """Someone asked this run to stop; what is not in the last checkpoint will be done again.

    Attributes:
        resume_hint: How to go on, for whoever stopped it.
    """

    def __init__(self, message: str, resume_hint: str = RESUME_HINT) -> None:
        super().__init__(message)
        self.resume_hint = resume_hint


class Interrupt:
    """While entered, the first SIGINT or SIGTERM sets `requested`; the second kills the process.

    Example:
        with Interrupt() as interrupt:
            for step in steps:
                interrupt.check()   # raises StopRequested between steps
                train(step)

    Enter it in the main thread; `raise_if_requested` may be called from any.

    Args:
        then: How to go on after a stop.
    """

    def __init__(self, resume_hint: str = RESUME_HINT) -> None:
        self._then = resume_hint
        self._event = threading.Event()
        self._name = ""
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self._arm()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that was not set from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for; also takes back handlers that a library replaced.

        Those set below Python are unseen by `signal.getsignal`.
        """
        if threading.current_thread() is threading.main_thread() and not self._event.is_set():
            self._arm()
        return self._event.is_set()

    def raise_if_requested(self) -> None:
        """Raises `StopRequested` if a stop was asked for."""
        if self.requested:
            raise StopRequested(f"stopped by {self._name}", self._then)

    async def wait_requested(self) -> None:
        """Returns once a stop was asked for."""
        while not self.requested:  # noqa: ASYNC110 - a signal sets no asyncio event
            await asyncio.sleep(POLL_INTERVAL_S)

    async def run_interruptible(self, work: Coroutine[Any, Any, T]) -> T:
        """Awaits `work`; cancels it and raises `StopRequested` if a stop was asked for."""
        task = asyncio.create_task(work)
        try:
            while not task.done():
                self.raise_if_requested()
                await asyncio.wait({task}, timeout=POLL_INTERVAL_S)
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _arm(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._event.is_set():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._name = signal.Signals(number).name
        self._event.set()
