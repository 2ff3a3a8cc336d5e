"""Brings one version of the weights to every engine, or takes the engine out of service.

    sender: prepare -> connect --------------------> send (NCCL only)
    worker:            connect   pause (caches dropped) -> receive -> thaw -> probe -> resume
                                 |<--------------- pause to resume ------------------------>|

A worker that fails at any step is never resumed: it may hold a mixture of
weights. It is named in the report, and whoever runs the fleet replaces it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from vz_ray.utils.timeouts import with_timeout
from vz_ray.weight_sync.parity_probe import ParityProbe, check_parity
from vz_ray.weight_sync.weight_source import WeightSource
from vz_ray.weight_sync.weight_store import WeightIntegrityError, WeightStore


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """What receivers are told.

    Attributes:
        version: Number of the new weights.
        checksum: Over all tensors; empty where the transport does not hash (NCCL).
        transfer_info: The transfer backend's own `update_info`.
        nbytes: Size of the weights.
        expected_logprobs: The learner's log-probs of the probe, if this publish is probed.
        node_id: Which node `directory` of `transfer_info` is on; empty means the driver's.
    """

    version: int
    checksum: str
    transfer_info: dict[str, Any]
    nbytes: int
    expected_logprobs: tuple[float, ...] | None = None
    node_id: str = ""

    @property
    def is_pull(self) -> bool:
        """Workers read it where it lies; otherwise it is pushed to a group of them."""
        return "directory" in self.transfer_info


class WeightTransport(Protocol):
    """The learner's side. Its calls have deadlines of their own, and say what the learner is doing."""

    async def prepare(self, version: int) -> WeightUpdate:
        """Gets the weights ready, while the engines still play."""
        ...

    async def connect(self, workers: Sequence[WeightReceiver]) -> None:
        """Joins exactly these workers, while they still play; for transports that have a group."""
        ...

    async def send(self, update: WeightUpdate) -> None:
        """Runs beside the workers' receiving; for transports that push.

        Raises:
            WeightsBroken: The weights of that version are not there any more.
        """
        ...

    async def abort(self) -> None:
        """Makes a `send` that is under way fail: one of those that it waits for is gone."""
        ...

    async def copy(self, update: WeightUpdate) -> WeightUpdate | None:
        """The same version where it can be pulled; None if no copy of it is kept."""
        ...


class WeightReceiver(Protocol):
    """A worker's side; every method ends when the worker has done it."""

    @property
    def name(self) -> str: ...

    @property
    def pulls_weights(self) -> bool:
        """It may vanish at any moment, so it is not to be in a group: it pulls a copy where there is one."""
        ...

    async def init_weight_transfer(self, info: dict[str, Any]) -> None: ...

    async def pause(self) -> None: ...

    async def receive_weights(self, update: WeightUpdate) -> None: ...

    async def resume_engine(self) -> None: ...

    async def score_probe(self, probe: ParityProbe) -> Sequence[float]: ...

    async def resume(self) -> None: ...


class ShmTransport:
    """Writes versions of a source to shared memory.

    Args:
        score: The learner's log-probs of the probe with the weights as they are now; None probes nothing.
    """

    def __init__(
        self,
        store: WeightStore,
        source: WeightSource,
        score_probe: Callable[[], tuple[float, ...]] | None = None,
    ) -> None:
        self._store, self._source, self._score_probe = store, source, score_probe

    async def prepare(self, version: int) -> WeightUpdate:
        manifest = await asyncio.to_thread(self._store.write_version, version, self._source)
        expected = await asyncio.to_thread(self._score_probe) if self._score_probe else None
        checksum = manifest.version.checksum
        info = {"directory": str(self._store.path(version)), "checksum": checksum}
        return WeightUpdate(version, checksum, info, manifest.nbytes, expected)

    async def connect(self, workers: Sequence[WeightReceiver]) -> None:
        """No group: workers read what `prepare` wrote."""

    async def send(self, update: WeightUpdate) -> None:
        """Nothing to push."""

    async def abort(self) -> None:
        """Nothing is pushed."""

    async def copy(self, update: WeightUpdate) -> WeightUpdate | None:
        """Every version lies where it can be pulled."""
        return update


@dataclass(frozen=True, slots=True)
class PublishReport:
    """How a publish went.

    Attributes:
        prepare_s: Seconds of getting ready while engines played.
        sync_s: Seconds from the first pause to the last resume.
        pause_s: Of these, until all stood still.
        receive_s: Of these, for the weights to arrive and be put to use.
        probe_s: Of these, for the comparison with the learner.
        max_probe_diff: Largest log-prob difference of a worker in service; None if not probed.
        updated: Workers that hold the version and play again.
        failed: Why each of the others is out of service.
    """

    version: int
    checksum: str
    nbytes: int
    prepare_s: float
    sync_s: float
    pause_s: float
    receive_s: float
    probe_s: float
    max_probe_diff: float | None
    updated: tuple[str, ...]
    failed: dict[str, str]


@dataclass
class PushTransfer:
    """A transfer to a group of workers, none of which may be missing. Without a sender there is none."""

    transport: WeightTransport | None
    members: set[str]
    timeout_s: float

    async def send(self, update: WeightUpdate) -> Exception | None:
        """Returns why it failed, so that receiving workers are still waited for."""
        if self.transport is None:
            return None
        try:
            what = f"sending weight version {update.version}"
            await with_timeout(
                self.transport.send(update), 2 * self.timeout_s, target="learner", operation=what
            )
        except Exception as error:
            return error
        return None

    async def receive(self, worker: WeightReceiver, update: WeightUpdate) -> None:
        """Lets a worker receive; if a member fails at it, nobody waits for the others' share any longer."""
        try:
            await worker.receive_weights(update)
        except Exception:
            if self.transport is not None and worker.name in self.members:
                await with_timeout(
                    self.transport.abort(), 2 * self.timeout_s, target="learner", operation="aborting a push"
                )
            raise


@dataclass
class ActiveReceivers:
    """The workers that still take part, and why the others do not."""

    workers: list[WeightReceiver]
    timeout_s: float
    failed: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    async def run_step(self, what: str, step: Callable[[WeightReceiver], Awaitable[Any]]) -> float:
        """Lets every worker take a step; those that fail are dropped. Returns its seconds."""
        began = time.monotonic()
        calls = [with_timeout(step(w), self.timeout_s, target=w.name, operation=what) for w in self.workers]
        results = await asyncio.gather(*calls, return_exceptions=True)
        for worker, result in zip(self.workers, results, strict=True):
            if isinstance(result, Exception):
                self.failed[worker.name] = f"{type(result).__name__}: {result}"
            elif isinstance(result, BaseException):
                raise result
        self.workers = [w for w in self.workers if w.name not in self.failed]
        return time.monotonic() - began

    def exclude(self, names: Collection[str], why: str) -> None:
        """These are out, too."""
        for worker in self.workers:
            if worker.name in names:
                self.failed[worker.name] = why
        self.workers = [w for w in self.workers if w.name not in self.failed]


class WeightPublisher:
    """Publishes versions, one at a time.

    Args:
        deadline_s: Seconds that each worker has for each step; a sender has twice as many, as it has
            a deadline of its own, of the same length, and may then find out what the learner is doing.
        probe: What engine and learner are compared on; None compares nothing.
        tolerance: Largest difference in log-prob that passes.
        every: Compare at every n-th version.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        probe: ParityProbe | None = None,
        tolerance: float = 1e-4,
        probe_every: int = 1,
    ) -> None:
        self._timeout_s, self._probe, self._tolerance, self._probe_every = (
            timeout_s,
            probe,
            tolerance,
            probe_every,
        )
        self.current: WeightUpdate | None = None

    async def prepare(self, version: int, transport: WeightTransport) -> WeightUpdate:
        """Gets a version ready to be delivered; engines may play meanwhile.

        Raises:
            ValueError: `version` is not newer than the last one.
            Overdue: The sender was not ready in time.
        """
        if self.current is not None and version <= self.current.version:
            raise ValueError(f"weight version {version} is not newer than {self.current.version}")
        what = f"preparing weight version {version}"
        self.current = await with_timeout(
            transport.prepare(version), 2 * self._timeout_s, target="learner", operation=what
        )
        return self.current

    async def publish(
        self, version: int, transport: WeightTransport, workers: Sequence[WeightReceiver]
    ) -> PublishReport:
        """Brings `version` to all `workers`.

        Raises:
            ValueError, Overdue: As `prepare`; no worker was paused.
            WeightsBroken: It could not be sent, or no worker took it.
        """
        began = time.monotonic()
        update = await self.prepare(version, transport)
        report = await self.deliver(update, workers, transport=transport, prepare_s=time.monotonic() - began)
        if report.failed and not report.updated:
            raise WeightIntegrityError(f"no worker took weight version {version}: {report.failed}")
        return report

    async def deliver(
        self,
        update: WeightUpdate,
        workers: Sequence[WeightReceiver],
        *,
        transport: WeightTransport | None = None,
        prepare_s: float = 0.0,
        joining: bool = False,
    ) -> PublishReport:
        """Brings a prepared update to `workers`; `joining`, the current one to workers that come later.

        Of an update that is pushed, those that join or may vanish pull a copy, if one is kept. Where
        one of the others dies while it is pushed, the push is aborted, and all that it went to are out
        of service: whatever has reached them is a part.

        Raises:
            WeightsBroken: Workers could not be connected, or it could not be sent; none of them may go on.
        """
        roll = ActiveReceivers(list(workers), self._timeout_s)
        what = f"weight version {update.version}"
        copy = await self._pull_copy(transport, update, joining or any(w.pulls_weights for w in workers))
        pulling = {w.name for w in workers if copy is not None and (joining or w.pulls_weights)}
        pushed = [] if update.is_pull else [w for w in workers if w.name not in pulling]
        if transport is not None:
            await self._connect(transport, pushed, what)
        pause_s = await roll.run_step(f"pausing for {what}", lambda w: w.pause())
        push = PushTransfer(transport if pushed else None, {w.name for w in pushed}, self._timeout_s)
        sent, receive_s = await asyncio.gather(
            push.send(update),
            roll.run_step(
                f"receiving {what}",
                lambda w: push.receive(w, copy if copy is not None and w.name in pulling else update),
            ),
        )
        if sent:
            roll.exclude(push.members, f"{what} was not sent: {type(sent).__name__}: {sent}")
            if not roll.workers:
                raise WeightIntegrityError(f"{what} was not sent: {type(sent).__name__}: {sent}") from sent
        await roll.run_step(f"thawing after {what}", lambda w: w.resume_engine())
        gaps: dict[str, float] = {}
        probe_s = await roll.run_step(f"probing {what}", lambda w: self._check_parity(w, update, gaps))
        await roll.run_step(f"resuming after {what}", lambda w: w.resume())
        return PublishReport(
            version=update.version,
            checksum=update.checksum,
            nbytes=update.nbytes,
            prepare_s=prepare_s,
            sync_s=time.monotonic() - roll.began,
            pause_s=pause_s,
            receive_s=receive_s,
            probe_s=probe_s,
            max_probe_diff=max((gaps[w.name] for w in roll.workers if w.name in gaps), default=None),
            updated=tuple(w.name for w in roll.workers),
            failed=roll.failed,
        )

    async def _connect(self, sender: WeightTransport, workers: Sequence[WeightReceiver], what: str) -> None:
        joining = f"connecting {', '.join(worker.name for worker in workers)} for {what}"
        try:
            await with_timeout(
                sender.connect(workers), 2 * self._timeout_s, target="learner", operation=joining
            )
        except Exception as error:
            raise WeightIntegrityError(f"{joining}: {type(error).__name__}: {error}") from error

    async def _pull_copy(
        self, sender: WeightTransport | None, update: WeightUpdate, wanted: bool
    ) -> WeightUpdate | None:
        if update.is_pull or sender is None or not wanted:
            return None
        what = f"a copy of weight version {update.version}"
        return await with_timeout(sender.copy(update), 2 * self._timeout_s, target="learner", operation=what)

    async def _check_parity(
        self, worker: WeightReceiver, update: WeightUpdate, gaps: dict[str, float]
    ) -> None:
        if self._probe is None or update.expected_logprobs is None or update.version % self._probe_every:
            return
        # Twice: the first scores with empty caches, the second with those that it filled.
        for _ in range(2):
            got = await worker.score_probe(self._probe)
            gap = check_parity(worker.name, update.version, update.expected_logprobs, got, self._tolerance)
            gaps[worker.name] = max(gap, gaps.get(worker.name, 0.0))
