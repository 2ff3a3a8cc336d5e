"""Limits on request bodies: maximum size, minimum rate, timeout.

Bytes are counted while the application reads the body. A body is too slow if it arrives below
`min_bytes_per_s` during `grace_s` of waiting, or if the total wait exceeds `timeout_s`. Time during which
the application does not read is not counted.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from vz_ray.serve.api_errors import ApiError, invalid_request


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Limits on one request body.

    Attributes:
        max_bytes: Maximum size.
        timeout_s: Maximum total wait for the body.
        min_bytes_per_s: Minimum rate.
        grace_s: Window over which the rate is measured.
    """

    max_bytes: int
    timeout_s: float
    min_bytes_per_s: float
    grace_s: float


class LimitedBody:
    """Wraps `receive` and `send` of one request and enforces the limits.

    If the application swallows the error, the error still becomes the response.
    """

    def __init__(self, limits: BodyLimits, scope: Scope, receive: Receive, send: Send) -> None:
        self._limits, self._receive, self._send = limits, receive, send
        self._started = self._ended = False
        self._error: ApiError | None = None
        self._pending_message: asyncio.Task[Message] | None = None
        self._received_bytes, self._waited_s = 0, 0.0
        self._window_bytes, self._window_waited_s = 0, 0.0
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isdecimal():
            raise invalid_request("The content-length must be a number.")
        if int(declared) > limits.max_bytes:
            raise self._too_large()

    async def receive(self) -> Message:
        """Replacement for the server's `receive`.

        Raises:
            ApiError: 413 (too large) or 408 (too slow).
        """
        if self._ended:
            return await self._receive()
        if self._error is not None:
            raise self._error
        try:
            message = await self._receive_in_time()
            self._count(len(message.get("body", b"")))
        except ApiError as error:
            self._error = error
            raise
        self._ended = message["type"] != "http.request" or not message.get("more_body")
        return message

    async def send(self, message: Message) -> None:
        """Replacement for the server's `send`."""
        if self._error is not None and not self._started:
            raise self._error  # FastAPI responds with 400 if reading the body fails
        self._started = True
        await self._send(message)

    def close(self) -> None:
        """Cancel a pending read."""
        if self._pending_message is not None:
            self._pending_message.cancel()

    @property
    def refusal(self) -> ApiError | None:
        """The error to send as the response; None without an error, or after a response has started."""
        return None if self._started else self._error

    async def _receive_in_time(self) -> Message:
        self._pending_message = asyncio.ensure_future(self._receive())
        while True:
            timeout_s = min(self._limits.grace_s - self._window_waited_s, self._limits.timeout_s - self._waited_s)
            wait_started = time.monotonic()
            await asyncio.wait({self._pending_message}, timeout=max(0.0, timeout_s))
            elapsed_s = time.monotonic() - wait_started
            self._waited_s += elapsed_s
            self._window_waited_s += elapsed_s
            self._check_rate()
            if self._pending_message.done():
                message, self._pending_message = self._pending_message.result(), None
                return message

    def _check_rate(self) -> None:
        limits = self._limits
        if self._waited_s >= limits.timeout_s:
            raise ApiError(408, f"The body took longer than {limits.timeout_s:g} s to arrive.", code="request_timeout")
        if self._window_waited_s >= limits.grace_s:
            if self._window_bytes < limits.min_bytes_per_s * limits.grace_s:
                raise ApiError(
                    408,
                    f"The body arrived below {limits.min_bytes_per_s / 2**10:g} KiB/s for {limits.grace_s:g} s.",
                    code="request_timeout",
                )
            self._window_bytes, self._window_waited_s = 0, 0.0

    def _count(self, size: int) -> None:
        self._received_bytes += size
        self._window_bytes += size
        if self._received_bytes > self._limits.max_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        message = f"The body is larger than the maximum of {self._limits.max_bytes / 2**20:g} MiB."
        return ApiError(413, message, code="request_too_large")
