"""Timeouts that name the awaited component and operation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class StepTimeout(TimeoutError):
    """An operation exceeded its timeout.

    Attributes:
        target: Actor or service that was awaited, for example `rollout-3`.
        operation: Awaited operation, for example `publish of weight version 7`.
        state: Last known state of the target; empty if unknown.
    """

    def __init__(self, target: str, operation: str, timeout_s: float, state: str = "") -> None:
        details = f" ({state})" if state else ""
        super().__init__(f"{target} did not finish {operation} within {timeout_s:g} s{details}")
        self.target, self.operation, self.timeout_s, self.state = target, operation, timeout_s, state

    def __reduce__(self) -> tuple[type[StepTimeout], tuple[str, str, float, str]]:
        return (StepTimeout, (self.target, self.operation, self.timeout_s, self.state))


async def with_timeout(awaitable: Awaitable[T], timeout_s: float, *, target: str, operation: str) -> T:
    """Await `awaitable`; raise `StepTimeout` with `target` and `operation` after `timeout_s`."""
    try:
        async with asyncio.timeout(timeout_s):
            return await awaitable
    except TimeoutError as error:
        if isinstance(error, StepTimeout):
            raise
        raise StepTimeout(target, operation, timeout_s) from error
