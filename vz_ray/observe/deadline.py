"""Every wait has a deadline, and an overdue one names whom it waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class Overdue(TimeoutError):
    """A wait ran past its deadline.

    Attributes:
        who: The actor or service waited for, for example `rollout-worker-3`.
        what: The request, for example `publish of weight version 7`.
        seconds: How long was waited.
        state: What was last known of it; empty if nothing was asked.
    """

    def __init__(self, who: str, what: str, seconds: float, state: str = "") -> None:
        known = f" ({state})" if state else ""
        super().__init__(f"{who} did not finish {what} within {seconds:g} s{known}")
        self.who, self.what, self.seconds, self.state = who, what, seconds, state

    def __reduce__(self) -> tuple[type[Overdue], tuple[str, str, float, str]]:
        return (Overdue, (self.who, self.what, self.seconds, self.state))


async def within(seconds: float, awaitable: Awaitable[T], *, who: str, what: str) -> T:
    """Awaits at most `seconds`; raises `Overdue` naming `who` and `what`."""
    try:
        async with asyncio.timeout(seconds):
            return await awaitable
    except TimeoutError as error:
        if isinstance(error, Overdue):
            raise
        raise Overdue(who, what, seconds) from error
