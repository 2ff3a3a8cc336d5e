"""Transfer of one version from a transport to the engines: as a whole, or in parts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from vz_ray.utils.timeouts import with_timeout
from vz_ray.weight_sync.engine_client import EngineClient
from vz_ray.weight_sync.transport import WeightTransport
from vz_ray.weight_sync.weight_store import WeightIntegrityError
from vz_ray.weight_sync.weight_version import WeightUpdate


@dataclass
class ActiveEngines:
    """Engines that still take part in a publish, and the failure reasons of the others."""

    engines: list[EngineClient]
    timeout_s: float
    failed: dict[str, str] = field(default_factory=dict)
    started_at: float = field(default_factory=time.monotonic)

    async def run_step(self, operation: str, step: Callable[[EngineClient], Awaitable[Any]]) -> float:
        """Run `step` on every engine and exclude failures. Return the seconds it took."""
        started_at = time.monotonic()
        calls = [
            with_timeout(step(engine), self.timeout_s, target=engine.name, operation=operation)
            for engine in self.engines
        ]
        results = await asyncio.gather(*calls, return_exceptions=True)
        for engine, result in zip(self.engines, results, strict=True):
            if isinstance(result, Exception):
                self.failed[engine.name] = f"{type(result).__name__}: {result}"
            elif isinstance(result, BaseException):
                raise result
        self.engines = [engine for engine in self.engines if engine.name not in self.failed]
        return time.monotonic() - started_at

    def learner_ranks(self) -> frozenset[int]:
        """Return the learner ranks on the GPUs of the engines."""
        return frozenset(engine.learner_rank for engine in self.engines)

    def exclude(self, names: Collection[str], reason: str) -> None:
        """Mark the named engines as failed."""
        for engine in self.engines:
            if engine.name in names:
                self.failed[engine.name] = reason
        self.engines = [engine for engine in self.engines if engine.name not in self.failed]


class PushTransfer:
    """A broadcast to a fixed set of engines.

    If a member fails or times out, the broadcast is aborted: the sender fails, and so does every member that
    still receives, because it would wait for the missing member until its timeout.

    Args:
        transport: The sender; None if no engine is a member.
        members: Names of the engines that receive the broadcast.
        timeout_s: Half of the timeout of a call to the transport.
    """

    def __init__(self, transport: WeightTransport | None, members: set[str], timeout_s: float) -> None:
        self.transport, self.members, self.timeout_s = transport, members, timeout_s
        self._abort_reason: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._abort_task: asyncio.Task[None] | None = None

    async def run(
        self, active: ActiveEngines, copies: Mapping[str, WeightUpdate], update: WeightUpdate
    ) -> Exception | None:
        """Send the weights while every engine receives them, or its copy; return the failure of the sender."""
        operation = f"receiving weight version {update.version}"
        send_error, _ = await asyncio.gather(
            self.send(update),
            active.run_step(operation, lambda engine: self.receive(engine, copies.get(engine.name, update))),
        )
        try:
            await self.finish()
        except Exception as error:
            return send_error or error
        return send_error

    async def send(self, update: WeightUpdate) -> Exception | None:
        """Send the weights. Return the failure, so that the caller still waits for the engines."""
        if self.transport is None:
            return None
        try:
            await self._call(self.transport.send(update), f"sending weight version {update.version}")
        except Exception as error:
            return error
        return None

    async def receive(self, engine: EngineClient, update: WeightUpdate) -> None:
        """Let an engine receive.

        Raises:
            WeightIntegrityError: Another member failed, and the broadcast was aborted.
        """
        if engine.name not in self.members:
            await engine.receive_weights(update)
            return
        receiving: asyncio.Future[Any] = asyncio.ensure_future(engine.receive_weights(update))
        try:
            await asyncio.wait({receiving, self._abort_reason}, return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done():
                raise WeightIntegrityError(f"the broadcast was aborted because {self._abort_reason.result()}")
            await receiving
        except BaseException:  # including the cancellation by a timeout
            self._abort(f"{engine.name} failed")
            raise
        finally:
            receiving.cancel()

    async def finish(self) -> None:
        """Wait until a started abort has finished; raise its error."""
        if self._abort_task is not None:
            await self._abort_task

    def _abort(self, reason: str) -> None:
        if self.transport is not None and self._abort_task is None:
            self._abort_task = asyncio.create_task(self._call(self.transport.abort(), "aborting a broadcast"))
            self._abort_reason.set_result(reason)

    async def _call(self, call: Awaitable[None], operation: str) -> None:
        await with_timeout(call, 2 * self.timeout_s, target="learner", operation=operation)


async def send_parts(transport: WeightTransport, update: WeightUpdate, active: ActiveEngines) -> Exception | None:
    """Let every engine receive the parts of an update one by one; return the failure of the sender.

    An engine that fails does not affect the others.
    """
    label = f"weight version {update.version}"
    await active.run_step(f"starting {label}", lambda engine: engine.begin_update())
    try:
        async with contextlib.aclosing(transport.parts(update, active.learner_ranks)) as all_parts:
            async for parts in all_parts:

                def receive(engine: EngineClient, parts: Any = parts) -> Awaitable[None]:
                    return engine.receive_part(parts[engine.learner_rank])

                await active.run_step(f"receiving {label}", receive)
    except Exception as error:
        return error
    await active.run_step(f"finishing {label}", lambda engine: engine.finish_update(update.version))
    return None
