"""Background thread that delivers items to a slow sink without blocking the caller."""

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
    """Bounded queue with one thread that calls `deliver` for each item in order.

    Args:
        name: Name of the sink, for the log.
        deliver: May block and may raise. An exception drops the item.
        max_pending: Maximum queue length. Items that exceed it are dropped.

    Attributes:
        dropped: Number of dropped items.
    """

    def __init__(self, name: str, deliver: Callable[[T], None], max_pending: int) -> None:
        self.name, self.dropped = name, 0
        self._deliver = deliver
        self._queue: queue.Queue[T | None] = queue.Queue(max_pending)
        self._closing = threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._run, name=f"sink {name}", daemon=True)
        self._thread.start()

    def put(self, item: T) -> None:
        """Enqueue `item`, or drop it if the queue is full. Never blocks."""
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._drop("the queue is full")

    def close(self, timeout_s: float) -> None:
        """Deliver pending items for at most `timeout_s` seconds, then drop the remaining ones."""
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(queue.Full):  # `_closing` stops the thread in that case
            self._queue.put(None, timeout=timeout_s)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        self._closing.set()
        self.dropped += sum(item is not None for item in list(self._queue.queue))

    def _run(self) -> None:
        while (item := self._queue.get()) is not None and not self._closing.is_set():
            try:
                self._deliver(item)
            except Exception as error:
                self._drop(f"{type(error).__name__}: {error}")

    def _drop(self, reason: str) -> None:
        self.dropped += 1
        if not self._warned:
            self._warned = True
            log.warning("Dropping items for %s (logged once, all are counted): %s", self.name, reason)
