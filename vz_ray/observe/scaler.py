"""How many of something there should be for a load that comes and goes. Pure: no actors, no clock."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Scaler:
    """Grows while the load is too much, shrinks while fewer would do, and waits before it believes either.

    Attributes:
        least: There are never fewer; 0 lets all go when there is nothing to do.
        most: There are never more.
        each: Load above which one is too much for each.
        grow_s: Seconds that the load must have been too much.
        shrink_s: Seconds that fewer must have done.
        behind_since: Since when the load is too much; None while it is not.
        idle_since: Since when fewer would do; None while they would not.
    """

    least: int
    most: int
    each: int
    grow_s: float
    shrink_s: float
    behind_since: float | None = None
    idle_since: float | None = None

    def target(self, now_s: float, count: int, load: int) -> int:
        """How many there should be.

        Args:
            now_s: Time on any clock that never goes back.
            count: Those there are, and those that are starting.
            load: What they have to do, and what waits for them.
        """
        behind = load > count * self.each
        # Fewer would do if they had at most half of what calls for more, so that it does not swing.
        idle = count > self.least and 2 * load <= (count - 1) * self.each
        self.behind_since = _since(self.behind_since, now_s, behind)
        self.idle_since = _since(self.idle_since, now_s, idle)
        if self.behind_since is not None and now_s - self.behind_since >= self.grow_s:
            self.behind_since = None
            return max(count, min(self.most, -(-load // self.each)))
        if self.idle_since is not None and now_s - self.idle_since >= self.shrink_s:
            self.idle_since = now_s
            return count - 1
        return count


def _since(before: float | None, now_s: float, holds: bool) -> float | None:
    """Since when something has held without a break."""
    if not holds:
        return None
    return now_s if before is None else before
