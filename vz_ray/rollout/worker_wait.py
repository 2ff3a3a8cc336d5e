"""Waiting for workers: notification of changes, and the timer of a period without workers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass


class NoWorkersError(RuntimeError):
    """No worker can be started; the message holds the last failures."""


@dataclass(slots=True)
class NoWorkerTimeout:
    """Timer of a period without workers. The caller supplies a monotonic clock.

    Attributes:
        warn_after_s: Seconds until the first warning.
        warn_every_s: Seconds between further warnings.
        absent_since_s: Start of the period; None while there are workers or nothing to do.
        last_warning_s: Time of the last warning in this period.
    """

    warn_after_s: float
    warn_every_s: float
    absent_since_s: float | None = None
    last_warning_s: float | None = None

    def elapsed_s(self, now_s: float, absent: bool) -> float:
        """Update the timer and return the length of the current period; 0 if not `absent`.

        Args:
            now_s: Current time.
            absent: Whether work is queued and no worker can run it.
        """
        if not absent:
            self.absent_since_s = self.last_warning_s = None
            return 0.0
        if self.absent_since_s is None:
            self.absent_since_s = now_s
        return now_s - self.absent_since_s

    def should_warn(self, now_s: float) -> bool:
        """Return whether a warning is due, and record it as emitted."""
        if self.absent_since_s is None:
            return False
        if self.last_warning_s is None:
            due_s = self.absent_since_s + self.warn_after_s
        else:
            due_s = self.last_warning_s + self.warn_every_s
        if now_s < due_s:
            return False
        self.last_warning_s = now_s
        return True


class ChangeNotifier:
    """Condition variable without a lock: `notify` never blocks."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()
