"""How much may be asked of the pool at once, and whose turn it is."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar

from vz_ray.utils.timeouts import StepTimeout, with_timeout

_asker: ContextVar[str] = ContextVar("asker", default="")


@contextmanager
def request_owner(name: str) -> Iterator[None]:
    """Requests made inside count as those of `name`, such as an episode."""
    token = _asker.set(name)
    try:
        yield
    finally:
        _asker.reset(token)


class ByteLimiter:
    """Lets requests through while their frames fit under a cap; askers take turns.

    Args:
        most_bytes: The cap.
        deadline_s: Longest wait for a turn, seconds.

    Each asker has a queue; the gate goes round the askers that wait. The next
    in turn is waited for even if a smaller request of another would fit now,
    so nobody starves. A request larger than the cap goes alone.

    Attributes:
        reserved_bytes: Bytes let through and not yet given back.
        peak_bytes: Most that was ever held.
    """

    def __init__(self, max_bytes: int, timeout_s: float) -> None:
        self._most, self._deadline_s = max_bytes, timeout_s
        self._waiting: OrderedDict[str, deque[tuple[int, asyncio.Future[None]]]] = OrderedDict()
        self.reserved_bytes = self.peak_bytes = 0

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return sum(map(len, self._waiting.values()))

    @asynccontextmanager
    async def reserve(self, size: int, what: str) -> AsyncIterator[None]:
        """Goes on when there is room for `size` bytes; gives it back at the end of the block.

        Raises:
            Overdue: There was none for `deadline_s`; it names what is in the way, and `what`.
        """
        if self._waiting or not self._fits(size):
            await self._wait(_asker.get(), size, what)
        else:
            self._take(size)
        try:
            yield
        finally:
            self.reserved_bytes -= size
            self._admit()

    async def _wait(self, asker: str, size: int, what: str) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(asker, deque()).append((size, turn))
        who = f"the gate of the clip pool ({self.reserved_bytes} of {self._most} bytes in flight when asked)"
        try:
            await with_timeout(turn, self._deadline_s, target=who, operation=what)
        except (asyncio.CancelledError, StepTimeout):
            if turn.done() and not turn.cancelled():
                self.reserved_bytes -= size  # it was let through at the same moment
            self._admit()
            raise

    def _admit(self) -> None:
        while self._waiting:
            asker, queue = next(iter(self._waiting.items()))
            while queue and queue[0][1].cancelled():
                queue.popleft()
            if queue:
                size, turn = queue[0]
                if not self._fits(size):
                    return
                queue.popleft()
                self._take(size)
                turn.set_result(None)
            if queue:
                self._waiting.move_to_end(asker)
            else:
                del self._waiting[asker]

    def _fits(self, size: int) -> bool:
        return not self.reserved_bytes or self.reserved_bytes + size <= self._most

    def _take(self, size: int) -> None:
        self.reserved_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.reserved_bytes)
