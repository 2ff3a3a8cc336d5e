"""How long there has been nobody to play what waits, and when to say so. Pure: no clock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Absence:
    """A time without workers.

    Attributes:
        first_s: Seconds after which it is worth a word; a worker that merely starts takes less.
        every_s: Seconds between further words.
        since: When it began; None while there is somebody, or nothing waits.
        said: When it was last worth a word.
    """

    first_s: float
    every_s: float
    since: float | None = None
    said: float | None = None

    def seconds(self, now_s: float, absent: bool) -> float:
        """How long it has lasted; 0 where it does not.

        Args:
            now_s: Time on any clock that never goes back.
            absent: Whether something waits and nobody is there to play it.
        """
        if not absent:
            self.since = self.said = None
            return 0.0
        if self.since is None:
            self.since = now_s
        return now_s - self.since

    def to_say(self, now_s: float) -> bool:
        """Whether it is time for a word, which then counts as said."""
        if self.since is None:
            return False
        due = self.since + self.first_s if self.said is None else self.said + self.every_s
        if now_s < due:
            return False
        self.said = now_s
        return True
