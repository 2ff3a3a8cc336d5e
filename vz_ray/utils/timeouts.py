"""Every wait has a deadline, and an overdue one names whom it waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class StepTimeout(TimeoutError):
    """A wait ran past its deadline.

    Attributes:
        target: The actor or service waited for, for example `rollout-worker-3`.
        operation: The request, for example `publish of weight version 7`.
        timeout_s: How long was waited.
        state: What was last known of it; empty if nothing was asked.
    """

    def __init__(self, target: str, operation: str, timeout_s: float, state: str = "") -> None:
        known = f" ({state})" if state else ""
        super().__init__(f"{target} did not finish {operation} within {timeout_s:g} s{known}")
        self.target, self.operation, self.timeout_s, self.state = target, operation, timeout_s, state

    def __reduce__(self) -> tuple[type[StepTimeout], tuple[str, str, float, str]]:
        return (StepTimeout, (self.target, self.operation, self.timeout_s, self.state))


async def with_timeout(awaitable: Awaitable[T], timeout_s: float, *, target: str, operation: str) -> T:
    """Awaits at most `timeout_s`; raises `StepTimeout` naming `target` and `operation`."""
    try:
        async with asyncio.timeout(timeout_s):
            return await awaitable
    except TimeoutError as error:
        if isinstance(error, StepTimeout):
            raise
        raise StepTimeout(target, operation, timeout_s) from error
