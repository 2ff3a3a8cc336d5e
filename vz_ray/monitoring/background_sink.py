"""Work for someone slow, who is never waited for: done in a thread, and given up where it piles up."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

log = logging.getLogger(__name__)


class BackgroundSink(Generic[T]):
    """A thread that hands items to `deliver` one after another.

    Args:
        name: Whom they go to, for the log.
        deliver: May take long and may raise; its item is lost then.
        most: Most items that wait.

    Attributes:
        dropped: Items that found no room, or were not delivered.
    """

    def __init__(self, name: str, deliver: Callable[[T], None], max_pending: int) -> None:
        self.name, self.dropped = name, 0
        self._deliver = deliver
        self._waiting: queue.Queue[T | None] = queue.Queue(max_pending)
        self._closing = threading.Event()
        self._told = False
        self._thread = threading.Thread(target=self._work, name=f"behind {name}", daemon=True)
        self._thread.start()

    def put(self, item: T) -> None:
        """Returns at once."""
        try:
            self._waiting.put_nowait(item)
        except queue.Full:
            self._lose("it is too slow")

    def close(self, timeout_s: float) -> None:
        """Waits at most `timeout_s` for what still waits; the rest is dropped."""
        until = time.monotonic() + timeout_s
        with contextlib.suppress(queue.Full):  # then the thread is told below
            self._waiting.put(None, timeout=timeout_s)
        self._thread.join(max(0.0, until - time.monotonic()))
        self._closing.set()
        self.dropped += sum(item is not None for item in list(self._waiting.queue))

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None and not self._closing.is_set():
            try:
                self._deliver(item)
            except Exception as error:
                self._lose(f"{type(error).__name__}: {error}")

    def _lose(self, why: str) -> None:
        self.dropped += 1
        if not self._told:
            self._told = True
            log.warning("%s does not take what it is sent, which is dropped and counted: %s", self.name, why)
