"""Publish one version of the weights to every engine and verify it.

    transport: prepare -> connect ------------------> send (NCCL only)
                                                                                       start_copy (NCCL, IPC)
    engine:               connect   pause (clear caches) -> receive -> resume_engine -> probe -> resume
                                    |<---------------- pause to resume ------------------------->|

An engine that fails a step is never resumed, because it may hold a mixture of weights. The report
names it, and the worker pool replaces it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from vz_ray.utils.timeouts import with_timeout
from vz_ray.weight_sync.engine_client import EngineClient
from vz_ray.weight_sync.parity_probe import ParityCheck, ParityProbe, ProbeGap
from vz_ray.weight_sync.transport import WeightTransport
from vz_ray.weight_sync.weight_store import WeightIntegrityError
from vz_ray.weight_sync.weight_version import WeightUpdate

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PublishReport:
    """Result of a publish.

    Attributes:
        prepare_s: Seconds to prepare the weights while engines generated.
        sync_s: Seconds from the first pause to the last resume.
        pause_s: Part of `sync_s` until every engine was paused.
        receive_s: Part of `sync_s` to receive and load the weights.
        probe_s: Part of `sync_s` for the parity check.
        probe_gap: Largest gap between an updated engine and the learner; None without a probe.
        probe_tolerance: Tolerance of the parity probe on the mean log-prob gap; None without a probe.
        updated: Engines that hold the version and generate again.
        failed: Failure reason of every other engine.
    """

    version: int
    checksum: str
    nbytes: int
    prepare_s: float
    sync_s: float
    pause_s: float
    receive_s: float
    probe_s: float
    probe_gap: ProbeGap | None
    probe_tolerance: float | None
    updated: tuple[str, ...]
    failed: dict[str, str]

    def probe_metrics(self) -> dict[str, float]:
        """Return the metrics of the parity probe; empty if this version was not probed."""
        if self.probe_gap is None or self.probe_tolerance is None:
            return {}
        return {
            "weight_sync/probe_gap": self.probe_gap.mean,
            "weight_sync/probe_kl": self.probe_gap.kl,
            "weight_sync/probe_tolerance": self.probe_tolerance,
        }


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

    def exclude(self, names: Collection[str], reason: str) -> None:
        """Mark the named engines as failed."""
        for engine in self.engines:
            if engine.name in names:
                self.failed[engine.name] = reason
        self.engines = [engine for engine in self.engines if engine.name not in self.failed]


class WeightPublisher:
    """Publish weight versions one at a time.

    Args:
        timeout_s: Timeout of each step of each engine. Calls to the transport get twice as long:
            the transport applies the same timeout itself and then inspects the learner.
        parity: Compares engine and learner; None disables the check.
        probe_every: Check parity at every n-th version, and at the first.

    Attributes:
        current: The last prepared update.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        parity: ParityCheck | None = None,
        probe_every: int = 1,
    ) -> None:
        self._timeout_s = timeout_s
        self._parity, self._probe_every, self._probed = parity, probe_every, False
        self._current_probe: ParityProbe | None = None
        self.current: WeightUpdate | None = None

    async def prepare(
        self, version: int, transport: WeightTransport, engines: Sequence[EngineClient] = ()
    ) -> WeightUpdate:
        """Prepare a version for delivery. Engines may generate meanwhile.

        At the first version, one of the `engines` continues the parity probe.

        Raises:
            ValueError: `version` is not newer than the current version.
            StepTimeout: The transport was not ready in time.
        """
        if self.current is not None and version <= self.current.version:
            raise ValueError(f"weight version {version} is not newer than {self.current.version}")
        probe = await self._next_probe(version, engines)
        self.current = await with_timeout(
            transport.prepare(version, probe),
            2 * self._timeout_s,
            target="learner",
            operation=f"preparing weight version {version}",
        )
        self._current_probe = probe
        self._probed = self._probed or self.current.probe_score is not None
        return self.current

    async def publish(self, version: int, transport: WeightTransport, engines: Sequence[EngineClient]) -> PublishReport:
        """Prepare `version` and deliver it to all `engines`.

        Raises:
            ValueError, StepTimeout: See `prepare`. No engine was paused.
            WeightIntegrityError: The weights were not sent, or every engine failed.
        """
        started_at = time.monotonic()
        update = await self.prepare(version, transport, engines)
        prepare_s = time.monotonic() - started_at
        report = await self.deliver(update, engines, transport=transport, prepare_s=prepare_s)
        if report.failed and not report.updated:
            raise WeightIntegrityError(f"no worker accepted weight version {version}: {report.failed}")
        return report

    async def deliver(
        self,
        update: WeightUpdate,
        engines: Sequence[EngineClient],
        *,
        transport: WeightTransport | None = None,
        prepare_s: float = 0.0,
        joining: bool = False,
    ) -> PublishReport:
        """Deliver a prepared update to `engines`.

        For a broadcast, joining engines and engines with `pulls_weights` pull a copy if there is one.
        If a member dies during the broadcast, the broadcast is aborted and all its members fail:
        each may hold partial weights.

        Args:
            update: The update.
            engines: Receivers.
            transport: Transport that prepared the update.
            prepare_s: Copied to the report.
            joining: The engines start between publishes and receive the current version.

        Raises:
            WeightIntegrityError: Connecting or sending failed. No engine may be resumed.
        """
        active = ActiveEngines(list(engines), self._timeout_s)
        label = f"weight version {update.version}"
        copy = await self._pull_copy(transport, update, joining or any(engine.pulls_weights for engine in engines))
        pulling = {engine.name for engine in engines if copy is not None and (joining or engine.pulls_weights)}
        pushed = [] if update.is_pull else [engine for engine in engines if engine.name not in pulling]
        if transport is not None:
            await self._connect(transport, pushed, label)
        pause_s = await active.run_step(f"pausing for {label}", lambda engine: engine.pause())
        push = PushTransfer(transport if pushed else None, {engine.name for engine in pushed}, self._timeout_s)
        send_error, receive_s = await asyncio.gather(
            push.send(update),
            active.run_step(
                f"receiving {label}",
                lambda engine: push.receive(engine, copy if copy is not None and engine.name in pulling else update),
            ),
        )
        try:
            await push.finish()
        except Exception as error:
            send_error = send_error or error
        if send_error:
            reason = f"{label} was not sent: {type(send_error).__name__}: {send_error}"
            active.exclude(push.members, reason)
            if not active.engines:
                raise WeightIntegrityError(reason) from send_error
        await active.run_step(f"resuming the engine after {label}", lambda engine: engine.resume_engine())
        tolerance = self._parity.max_gap if self._parity else None
        probe_s, gap = await self._probe_engines(active, update)
        await active.run_step(f"resuming after {label}", lambda engine: engine.resume())
        if transport is not None and not joining:
            transport.start_copy(update)
        return PublishReport(
            version=update.version,
            checksum=update.checksum,
            nbytes=update.nbytes,
            prepare_s=prepare_s,
            sync_s=time.monotonic() - active.started_at,
            pause_s=pause_s,
            receive_s=receive_s,
            probe_s=probe_s,
            probe_gap=gap,
            probe_tolerance=tolerance if gap else None,
            updated=tuple(engine.name for engine in active.engines),
            failed=active.failed,
        )

    async def _connect(self, transport: WeightTransport, engines: Sequence[EngineClient], label: str) -> None:
        operation = f"connecting {', '.join(engine.name for engine in engines)} for {label}"
        try:
            await with_timeout(transport.connect(engines), 2 * self._timeout_s, target="learner", operation=operation)
        except Exception as error:
            raise WeightIntegrityError(f"{operation}: {type(error).__name__}: {error}") from error

    async def _pull_copy(
        self, transport: WeightTransport | None, update: WeightUpdate, needed: bool
    ) -> WeightUpdate | None:
        if update.is_pull or transport is None or not needed:
            return None
        return await with_timeout(
            transport.copy(update),
            2 * self._timeout_s,
            target="learner",
            operation=f"copying weight version {update.version}",
        )

    async def _next_probe(self, version: int, engines: Sequence[EngineClient]) -> ParityProbe | None:
        """Return the probe of a version, or None if the version is not probed."""
        parity = self._parity
        if parity is None or (self._probed and version % self._probe_every):
            return None
        for engine in [] if parity.is_continued else engines:
            try:
                token_ids = await with_timeout(
                    engine.continue_probe(parity.probe),
                    self._timeout_s,
                    target=engine.name,
                    operation="continuing the parity probe",
                )
            except Exception as error:
                log.warning("Worker %s did not continue the parity probe: %s", engine.name, error)
            else:
                parity.continue_with(token_ids)
                break
        return parity.probe

    async def _probe_engines(self, active: ActiveEngines, update: WeightUpdate) -> tuple[float, ProbeGap | None]:
        """Compare the engines with the learner. Return the seconds it took and the largest gap."""
        gaps: dict[str, ProbeGap] = {}
        seconds = await active.run_step(
            f"probing weight version {update.version}", lambda engine: self._check_parity(engine, update, gaps)
        )
        passed = [gaps[engine.name] for engine in active.engines if engine.name in gaps]
        largest = max(passed, key=lambda gap: gap.mean, default=None)
        if self._parity is not None and largest is not None:
            self._parity.calibrate(largest)
        return seconds, largest

    async def _check_parity(self, engine: EngineClient, update: WeightUpdate, gaps: dict[str, ProbeGap]) -> None:
        probe = self._current_probe
        if self._parity is None or probe is None or update.probe_score is None:
            return
        # Twice: the first pass scores with empty caches, the second with the caches that it filled.
        for _ in range(2):
            actual = await engine.score_probe(probe)
            gap = self._parity.compare(engine.name, update.version, update.probe_score, actual)
            gaps[engine.name] = max(gap, gaps.get(engine.name, gap), key=lambda gap: gap.mean)
