"""Admission limit of the decode pool: bytes in flight, shared fairly between owners."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar

from vz_ray.utils.timeouts import StepTimeout, with_timeout

_owner: ContextVar[str] = ContextVar("owner", default="")


@contextmanager
def request_owner(name: str) -> Iterator[None]:
    """Attribute the requests made inside the context to `name`, such as an episode."""
    token = _owner.set(name)
    try:
        yield
    finally:
        _owner.reset(token)


class ByteLimiter:
    """Limit on the bytes in flight, with one queue per owner and round robin between owners.

    The request at the head of the round blocks smaller requests of other owners, so no owner
    starves. A request larger than the limit runs alone.

    Args:
        max_bytes: The limit.
        timeout_s: Timeout of the wait for admission, seconds.
    """

    def __init__(self, max_bytes: int, timeout_s: float) -> None:
        self._max_bytes, self._timeout_s = max_bytes, timeout_s
        self._queues: OrderedDict[str, deque[tuple[int, asyncio.Future[None]]]] = OrderedDict()
        self.reserved_bytes = self.peak_bytes = 0

    @property
    def waiting(self) -> int:
        """Number of queued requests."""
        return sum(map(len, self._queues.values()))

    @asynccontextmanager
    async def reserve(self, num_bytes: int, operation: str) -> AsyncIterator[None]:
        """Wait until `num_bytes` fit, reserve them, and release them when the context exits.

        Raises:
            StepTimeout: They did not fit within `timeout_s`; names the bytes in flight and `operation`.
        """
        if self._queues or not self._fits(num_bytes):
            await self._enqueue(_owner.get(), num_bytes, operation)
        else:
            self._take(num_bytes)
        try:
            yield
        finally:
            self.reserved_bytes -= num_bytes
            self._admit_queued()

    async def _enqueue(self, owner: str, num_bytes: int, operation: str) -> None:
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(owner, deque()).append((num_bytes, admitted))
        target = (
            f"the admission queue of the decode pool ({self.reserved_bytes} of {self._max_bytes} bytes "
            "in flight at the start of the wait)"
        )
        try:
            await with_timeout(admitted, self._timeout_s, target=target, operation=operation)
        except (asyncio.CancelledError, StepTimeout):
            if admitted.done() and not admitted.cancelled():
                self.reserved_bytes -= num_bytes  # admitted before the cancellation was delivered
            self._admit_queued()
            raise

    def _admit_queued(self) -> None:
        while self._queues:
            owner, queue = next(iter(self._queues.items()))
            while queue and queue[0][1].cancelled():
                queue.popleft()
            if queue:
                num_bytes, admitted = queue[0]
                if not self._fits(num_bytes):
                    return
                queue.popleft()
                self._take(num_bytes)
                admitted.set_result(None)
            if queue:
                self._queues.move_to_end(owner)
            else:
                del self._queues[owner]

    def _fits(self, num_bytes: int) -> bool:
        return not self.reserved_bytes or self.reserved_bytes + num_bytes <= self._max_bytes

    def _take(self, num_bytes: int) -> None:
        self.reserved_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.reserved_bytes)
