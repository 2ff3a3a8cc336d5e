"""Bodies of requests: how large they may be, and how slowly they may come.

A body is counted while the application reads it. It is too slow when any
`grace_s` that were spent waiting for it brought less than `rate` allows, or when
all of it took longer than `seconds`; time in which the application does not read
does not count.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from vz_ray.serve.api_errors import ApiError, invalid_request, too_large


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """What a body may be.

    Attributes:
        max_bytes: Largest.
        timeout_s: Longest time spent waiting for it.
        min_bytes_per_s: Slowest, bytes per second.
        grace_s: Over which the rate is taken.
    """

    max_bytes: int
    timeout_s: float
    min_bytes_per_s: float
    grace_s: float


class LimitedBody:
    """The body of one request; a refusal that the application swallows still becomes the response."""

    def __init__(self, limits: BodyLimits, scope: Scope, receive: Receive, send: Send) -> None:
        self._limits, self._receive, self._send = limits, receive, send
        self._started = self._ended = False
        self._refused: ApiError | None = None
        self._next: asyncio.Task[Message] | None = None
        self._arrived, self._waited = 0, 0.0
        self._window_arrived, self._window_waited = 0, 0.0
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isdecimal():
            raise invalid_request("The content-length is no number.")
        if int(declared) > limits.max_bytes:
            raise self._too_large()

    async def receive(self) -> Message:
        """In place of the server's `receive`.

        Raises:
            ApiError: 413 or 408.
        """
        if self._ended:
            return await self._receive()
        if self._refused is not None:
            raise self._refused
        try:
            message = await self._waited_for()
            self._count(len(message.get("body", b"")))
        except ApiError as error:
            self._refused = error
            raise
        self._ended = message["type"] != "http.request" or not message.get("more_body")
        return message

    async def send(self, message: Message) -> None:
        """In place of the server's `send`."""
        if self._refused is not None and not self._started:
            raise self._refused  # FastAPI, for one, answers 400 when reading the body fails
        self._started = True
        await self._send(message)

    def close(self) -> None:
        """Nothing waits any more."""
        if self._next is not None:
            self._next.cancel()

    @property
    def refusal(self) -> ApiError | None:
        """What the response must be, if it can still be chosen."""
        return None if self._started else self._refused

    async def _waited_for(self) -> Message:
        self._next = asyncio.ensure_future(self._receive())
        while True:
            allowed = min(self._limits.grace_s - self._window_waited, self._limits.timeout_s - self._waited)
            since = time.monotonic()
            await asyncio.wait({self._next}, timeout=max(0.0, allowed))
            waited = time.monotonic() - since
            self._waited += waited
            self._window_waited += waited
            self._check_pace()
            if self._next.done():
                message, self._next = self._next.result(), None
                return message

    def _check_pace(self) -> None:
        limits = self._limits
        if self._waited >= limits.timeout_s:
            raise ApiError(
                408, f"The body took longer than {limits.timeout_s:g} s to arrive.", code="request_timeout"
            )
        if self._window_waited >= limits.grace_s:
            if self._window_arrived < limits.min_bytes_per_s * limits.grace_s:
                raise ApiError(
                    408,
                    f"The body came more slowly than {limits.min_bytes_per_s / 1e3:g} KB/s for {limits.grace_s:g} s.",
                    code="request_timeout",
                )
            self._window_arrived, self._window_waited = 0, 0.0

    def _count(self, size: int) -> None:
        self._arrived += size
        self._window_arrived += size
        if self._arrived > self._limits.max_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return too_large(
            f"The body is larger than {self._limits.max_bytes / 1e6:g} MB, the most that is read."
        )
