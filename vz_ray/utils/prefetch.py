"""Items that a thread builds ahead of their use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


@contextmanager
def prefetch(
    build: Callable[[S], T],
    items: Iterable[S],
    ahead: int,
    *,
    initializer: Callable[[], object] | None = None,
) -> Iterator[Iterator[T]]:
    """Build each item in one thread, in order, while the caller uses the items before it.

    An error of `build` is raised where the caller takes that item. When the block ends, pending items are
    cancelled and the running `build` is awaited, so `build` never runs outside the block.

    Args:
        build: Returns the result for an item; it must end or time out.
        ahead: Maximum number of results that exist besides the caller's current one; 0 builds each in the
            caller's thread, when it is taken.
        initializer: Called once in the thread.

    Yields:
        The results in order.
    """
    if not ahead:
        yield map(build, items)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch", initializer=initializer) as executor:
        try:
            yield _results(executor, build, items, ahead)
        finally:
            executor.shutdown(wait=False, cancel_futures=True)


def _results(executor: ThreadPoolExecutor, build: Callable[[S], T], items: Iterable[S], ahead: int) -> Iterator[T]:
    pending: deque[Future[T]] = deque()
    for item in items:
        pending.append(executor.submit(copy_context().run, build, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
