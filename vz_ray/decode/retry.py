"""Retry policy of decode requests: attempts with timeouts, on different decoders.

route -> attempt with timeout -> result
            |-> decoder died            record failure, retry on another decoder (Ray restarts it)
            |-> timeout, decoder stuck  log stacks, kill decoder, record failure, retry
            |-> timeout, decoder busy   retry on another decoder
            |-> VideoError, UserError   raise, no retry
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from vz_ray.config.clips import ClipsConfig
from vz_ray.decode.quarantine import Quarantine
from vz_ray.decode.router import DecoderRouter, decoder_name
from vz_ray.decode.stats import RequestCounters
from vz_ray.utils.errors import UserError
from vz_ray.utils.timeouts import StepTimeout, with_timeout
from vz_ray.video.errors import DecoderDiedError, UnexpectedReadError, VideoError
from vz_ray.video.video_file import is_url

log = logging.getLogger(__name__)

_STATUS_TIMEOUT_S = 3.0
"""Timeout of a decoder's status methods; a decoder that exceeds it is stuck."""

_POLL_S = 0.2

ActorCall = Callable[[Any], Any]
"""Submit a task to the given actor; returns a Ray object reference."""


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """One request to a decoder.

    Attributes:
        operation: Description for errors and logs.
        num_bytes: Upper bound on the size of the result.
    """

    uri: str
    operation: str
    num_bytes: int
    submit: ActorCall


class RetryPolicy:
    """Runs requests with up to `config.max_attempts` attempts."""

    def __init__(self, router: DecoderRouter, config: ClipsConfig) -> None:
        self._router, self._config = router, config
        self.quarantine = Quarantine(config.quarantine_after)
        self.counters = RequestCounters()

    async def run(self, request: DecodeRequest, suspect_lock: asyncio.Lock) -> Any:
        """Return the result of the first successful attempt.

        Args:
            request: The request.
            suspect_lock: Held during an attempt for a suspect video. It belongs to the event loop.

        Raises:
            VideoError: The video cannot be read; `DecoderDiedError` if the last decoder died.
            StepTimeout: The last attempt timed out.
        """
        tried: set[int] = set()
        failure: Exception = AssertionError("no attempt was made")
        for attempt in range(self._config.max_attempts):
            self.counters.retried += attempt > 0
            slot = self._router.route(request.uri, tried)
            async with self._serialize_suspects(request, suspect_lock):
                life = self.quarantine.current_life(slot)
                self.quarantine.check(request.uri)
                try:
                    if slot in tried:
                        await self.wait_for_restart(slot, request.operation)
                    result = await self._attempt(slot, request)
                    self.quarantine.record_success(request.uri)
                    return result
                except StepTimeout as timeout:
                    failure = timeout
                    self.counters.timed_out += 1
                    if await self._kill_if_stuck(slot):
                        reason = f"decoder stuck for {self._config.timeout_s:g} s during {request.operation}"
                        self.quarantine.record_failure(request.uri, reason, life)
                except (RayActorError, ObjectLostError) as error:
                    self.counters.lost += 1
                    failure = DecoderDiedError(
                        f"{request.uri}: {decoder_name(slot)} died during {request.operation} "
                        f"({type(error).__name__}), attempt {attempt + 1} of {self._config.max_attempts}"
                    )
                    await self._router.sync()
                    if slot in self._router.actors:  # otherwise the autoscaler stopped it
                        reason = f"decoder died during {request.operation}"
                        self.quarantine.record_failure(request.uri, reason, life)
                except UnexpectedReadError as error:
                    raise UnexpectedReadError(f"{request.uri}: {error}", error.model_message) from error
            tried.add(slot)
        raise failure

    async def wait_for_restart(self, slot: int, operation: str) -> None:
        """Wait until a decoder that failed responds again."""

        async def poll() -> None:
            while True:
                try:
                    await self._router.known_actors[slot].busy_s.remote()
                    return
                except RayActorError:
                    await asyncio.sleep(_POLL_S)

        await with_timeout(
            poll(),
            self._config.timeout_s,
            target=decoder_name(slot),
            operation=f"its restart before {operation}",
        )

    @asynccontextmanager
    async def _serialize_suspects(self, request: DecodeRequest, lock: asyncio.Lock) -> AsyncIterator[None]:
        if not self.quarantine.is_suspect(request.uri):
            yield
            return
        await with_timeout(
            lock.acquire(),
            self._config.queue_timeout_s,
            target="the retry of other suspect requests",
            operation=f"before {request.operation}",
        )
        try:
            yield
        finally:
            lock.release()

    async def _attempt(self, slot: int, request: DecodeRequest) -> Any:
        """Run one attempt; download a URL first, under its own timeout."""
        if is_url(request.uri):
            await self._call(
                slot,
                lambda actor: actor.download.remote(request.uri),
                self._config.download_timeout_s,
                f"download of {request.uri}",
            )
        return await self._call(slot, request.submit, self._config.timeout_s, request.operation)

    async def _call(self, slot: int, submit: ActorCall, timeout_s: float, operation: str) -> Any:
        self._router.in_flight[slot] += 1
        result_ref = submit(self._router.known_actors[slot])
        try:
            return await with_timeout(result_ref, timeout_s, target=decoder_name(slot), operation=operation)
        except RayTaskError as error:
            if isinstance(error.cause, VideoError | UserError):
                raise error.cause from None
            raise
        except (StepTimeout, asyncio.CancelledError):
            ray.cancel(result_ref)  # removes it from the actor's queue if it has not started
            raise
        finally:
            self._router.in_flight[slot] -= 1

    async def _kill_if_stuck(self, slot: int) -> bool:
        """Kill the decoder if its current request exceeds the timeout; Ray restarts it.

        A decoder that only has a long queue is left alone. Returns whether it was killed.
        """
        actor = self._router.actors.get(slot)
        if actor is None:
            return False  # the autoscaler removed it
        try:
            busy_s = await get_status(slot, actor.busy_s.remote(), "a status request")
        except RayActorError:
            return False  # already dead, Ray restarts it
        except StepTimeout:
            busy_s = float("inf")
        if busy_s < self._config.timeout_s:
            return False
        await self._log_stacks(slot, actor)
        self.counters.killed += 1
        ray.kill(actor, no_restart=False)
        return True

    async def _log_stacks(self, slot: int, actor: Any) -> None:
        """Log the thread stacks of a stuck decoder, if it still responds."""
        try:
            stacks = await get_status(slot, actor.stacks.remote(), "a stack dump")
        except (StepTimeout, RayActorError) as error:
            stacks = f"no stack dump: {error}"
        log.warning("Killing stuck decoder %s:\n%s", decoder_name(slot), stacks)


async def get_status(slot: int, result_ref: Any, operation: str) -> Any:
    """Await a status method of a decoder, which a responsive one answers at once."""
    return await with_timeout(result_ref, _STATUS_TIMEOUT_S, target=decoder_name(slot), operation=operation)
