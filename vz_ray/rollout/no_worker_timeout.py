"""How long there has been nobody to play what waits, and when to say so. Pure: no clock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class NoWorkerTimeout:
    """A time without workers.

    Attributes:
        warn_after_s: Seconds after which it is worth a word; a worker that merely starts takes less.
        warn_every_s: Seconds between further words.
        absent_since_s: When it began; None while there is somebody, or nothing waits.
        last_warning_s: When it was last worth a word.
    """

    warn_after_s: float
    warn_every_s: float
    absent_since_s: float | None = None
    last_warning_s: float | None = None

    def elapsed_s(self, now_s: float, absent: bool) -> float:
        """How long it has lasted; 0 where it does not.

        Args:
            now_s: Time on any clock that never goes back.
            absent: Whether something waits and nobody is there to play it.
        """
        if not absent:
            self.absent_since_s = self.last_warning_s = None
            return 0.0
        if self.absent_since_s is None:
            self.absent_since_s = now_s
        return now_s - self.absent_since_s

    def should_warn(self, now_s: float) -> bool:
        """Whether it is time for a word, which then counts as said."""
        if self.absent_since_s is None:
            return False
        due = (
            self.absent_since_s + self.warn_after_s
            if self.last_warning_s is None
            else self.last_warning_s + self.warn_every_s
        )
        if now_s < due:
            return False
        self.last_warning_s = now_s
        return True
