"""Publish one version of the weights to every engine and verify it.

    transport: prepare -> connect ------------------> send or parts -> release           start_copy (NCCL, IPC)
    engine:               connect   pause (clear caches) -> receive -> resume_engine -> probe -> resume
                                    |<---------------- pause to resume ------------------------->|

`send` is a broadcast (NCCL). Parts are buckets in the memory of the engine's GPU (IPC). An engine that sleeps
wakes its weights at `pause` and its KV cache at `resume_engine`.

An engine that fails a step is never resumed, because it may hold a mixture of weights. The report
names it, and the worker pool replaces it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vz_ray.utils.timeouts import with_timeout
from vz_ray.weight_sync.engine_client import EngineClient
from vz_ray.weight_sync.parity_probe import ParityCheck, ParityProbe, ProbeGap
from vz_ray.weight_sync.transfer import ActiveEngines, PushTransfer, send_parts
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
        resume_s: Part of `sync_s` to resume the engines, before the parity check.
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
    resume_s: float
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


class WeightPublisher:
    """Publish weight versions one at a time.

    Args:
        timeout_s: Timeout of each step of each engine. Calls to the transport get twice as long:
            the transport applies the same timeout itself and then inspects the learner.
        parity: Compares engine and learner; None disables the check.
        probe_every: Check parity at every n-th version, and at the first.

    Attributes:
        current: The last prepared update.
        newest: Newest version, also if its preparation failed: its number is used up, because a transport may
            have written it.
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
        self.newest = 0

    async def prepare(
        self, version: int, transport: WeightTransport, engines: Sequence[EngineClient] = ()
    ) -> WeightUpdate:
        """Prepare a version for delivery. Engines may generate meanwhile.

        At the first version, one of the `engines` continues the parity probe.

        Raises:
            ValueError: `version` is not newer than the newest version.
            StepTimeout: The transport was not ready in time.
        """
        if version <= self.newest:
            raise ValueError(f"weight version {version} is not newer than {self.newest}")
        self.newest = version
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
        pulling = {e.name for e in engines if joining or (e.pulls_weights and not update.in_parts)}
        copy = await self._pull_copy(transport, update, bool(pulling))
        pushed = [] if update.is_pull else [e for e in engines if copy is None or e.name not in pulling]
        copies = {name: copy for name in pulling if copy is not None}
        if transport is not None:
            await self._connect(transport, pushed, label)
        pause_s = await active.run_step(f"pausing for {label}", lambda engine: engine.pause())
        receive_started_at = time.monotonic()
        await self._send(active, update, transport if pushed else None, {e.name for e in pushed}, copies)
        receive_s = time.monotonic() - receive_started_at
        if transport is not None and not joining:
            await self._release(transport, label)
        resume_s = await active.run_step(f"resuming the engine after {label}", lambda engine: engine.resume_engine())
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
            resume_s=resume_s,
            probe_s=probe_s,
            probe_gap=gap,
            probe_tolerance=tolerance if gap else None,
            updated=tuple(engine.name for engine in active.engines),
            failed=active.failed,
        )

    async def _send(
        self,
        active: ActiveEngines,
        update: WeightUpdate,
        transport: WeightTransport | None,
        pushed: set[str],
        copies: Mapping[str, WeightUpdate],
    ) -> None:
        """Send the update to the engines in `pushed`, and let the others read `copies` or the update itself.

        Raises:
            WeightIntegrityError: Sending failed, and no engine is left.
        """
        if transport is not None and update.in_parts:
            error = await send_parts(transport, update, active)
        else:
            error = await PushTransfer(transport, pushed, self._timeout_s).run(active, copies, update)
        if error is not None:
            reason = f"weight version {update.version} was not sent: {type(error).__name__}: {error}"
            active.exclude(pushed, reason)
            if not active.engines:
                raise WeightIntegrityError(reason) from error

    async def _release(self, transport: WeightTransport, label: str) -> None:
        operation = f"freeing memory for the engines after {label}"
        try:
            await with_timeout(transport.release(), 2 * self._timeout_s, target="learner", operation=operation)
        except Exception as error:
            raise WeightIntegrityError(f"{operation}: {type(error).__name__}: {error}") from error

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
        await self.continue_probe(engines)
        return parity.probe

    async def continue_probe(self, engines: Sequence[EngineClient]) -> None:
        """Let one of the awake `engines` continue the parity probe, unless one has done so."""
        parity = self._parity
        if parity is None:
            return
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
