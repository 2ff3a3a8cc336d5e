"""The learner's weight transports, one per value of `weights.transport`.

    shm     rank 0 writes each version to shared memory; workers read it
    nccl    rank 0 broadcasts to an NCCL group of all workers
    ipc     each rank exports its GPU memory to the engine on the same GPU, bucket by bucket

With nccl and ipc, an optional copy in shared memory serves workers that join between publishes. It is written after
delivery, while the engines generate.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vz_ray.config.rollout import WeightsConfig
from vz_ray.learner.learner import Learner
from vz_ray.weight_sync import EngineClient, WeightTransport, WeightUpdate
from vz_ray.weight_sync.nccl_broadcast import NcclTopology
from vz_ray.weight_sync.parity_probe import ParityProbe

log = logging.getLogger(__name__)


def create_weight_transport(
    learner: Learner,
    config: WeightsConfig,
    store_dir: Path,
    tensor_parallel_size: int,
    *,
    colocate: bool = False,
) -> WeightTransport:
    """Return the configured transport; `store_dir` holds the versions in shared memory.

    Args:
        colocate: Learner and engines alternate on their GPUs.
    """
    bucket_bytes, timeout_s = config.bucket_mib * 2**20, config.timeout_s
    shm = LearnerShmTransport(learner, store_dir, bucket_bytes, timeout_s)
    fallback = shm if config.keep_shm_copy or colocate else None
    ipc = LearnerIpcTransport(learner, timeout_s, fallback, bucket_bytes=bucket_bytes)
    if colocate:
        return ColocatedTransport(learner, ipc if config.transport == "ipc" else shm, timeout_s)
    if config.transport == "shm":
        return shm
    if config.transport == "ipc":
        return ipc
    return LearnerNcclTransport(learner, tensor_parallel_size, timeout_s, fallback)


class LearnerShmTransport(WeightTransport):
    """Publish through shared memory."""

    def __init__(self, learner: Learner, root: Path, bucket_bytes: int, timeout_s: float) -> None:
        self._learner, self._root = learner, root
        self._bucket_bytes, self._timeout_s = bucket_bytes, timeout_s

    async def prepare(self, version: int, probe: ParityProbe | None = None) -> WeightUpdate:
        """Write the current weights as `version` and score the probe."""
        results = await self._learner.call_all(
            "write_weights", version, self._root, self._bucket_bytes, probe, timeout_s=self._timeout_s
        )
        return results[0]

    async def write_copy(self, version: int) -> WeightUpdate:
        """Write the announced version; see `LearnerActor.write_copy`."""
        results = await self._learner.call_all(
            "write_copy", version, self._root, self._bucket_bytes, timeout_s=self._timeout_s
        )
        return results[0]


class _AnnouncedTransport(WeightTransport):
    """Base of transports that read the learner's GPU memory, with a copy in shared memory.

    The copy is written after delivery, so that no publish waits for it. It is the delivered version: a rank runs
    its calls in the order in which they arrive, so a following `grpo_step` starts after the copy has ended, and a
    copy that arrives later is refused, because the optimizer has stepped since the announcement. Without rollout
    during learning this costs nothing; with `max_staleness` the learner waits for the rest of the copy. A copy on
    demand was not chosen: with `max_staleness` the learner is almost always in a step when a worker joins.

    Args:
        fallback: Writes copies to shared memory; None disables copies.
    """

    def __init__(
        self,
        learner: Learner,
        timeout_s: float,
        fallback: LearnerShmTransport | None = None,
    ) -> None:
        self._learner, self._timeout_s = learner, timeout_s
        self._fallback = fallback
        self._copy: tuple[int, asyncio.Task[WeightUpdate | None]] | None = None  # version, result

    async def prepare(self, version: int, probe: ParityProbe | None = None) -> WeightUpdate:
        """Announce the current weights as `version` and score the probe."""
        results = await self._learner.call_all("announce_weights", version, probe, timeout_s=self._timeout_s)
        return results[0]

    def start_copy(self, update: WeightUpdate) -> None:
        """Start to write the copy of this version, once."""
        if self._fallback is not None and (self._copy is None or self._copy[0] < update.version):
            self._copy = update.version, asyncio.create_task(self._write_copy(self._fallback, update))

    async def copy(self, update: WeightUpdate) -> WeightUpdate | None:
        """Return the copy of this version, written now if that has not started yet.

        Returns:
            None if copies are disabled, writing failed, or a newer version was copied.
        """
        self.start_copy(update)
        if self._copy is None or self._copy[0] != update.version:
            return None
        # Several workers may wait for one copy; a timeout of one does not cancel it.
        return await asyncio.shield(self._copy[1])

    async def _write_copy(self, fallback: LearnerShmTransport, update: WeightUpdate) -> WeightUpdate | None:
        try:
            copy = await fallback.write_copy(update.version)
        except Exception as error:
            log.warning(
                "No copy of weight version %d in shared memory: %s. Workers that join now wait for the next version.",
                *(update.version, error),
            )
            return None
        return replace(copy, probe_score=update.probe_score)


class LearnerIpcTransport(_AnnouncedTransport):
    """Publish in parts, from each rank to the engine on its GPU.

    Args:
        bucket_bytes: Maximum size of a part; a larger tensor is a part of its own.
    """

    def __init__(
        self,
        learner: Learner,
        timeout_s: float,
        fallback: LearnerShmTransport | None = None,
        *,
        bucket_bytes: int,
    ) -> None:
        super().__init__(learner, timeout_s, fallback)
        self._bucket_bytes = bucket_bytes

    async def prepare(self, version: int, probe: ParityProbe | None = None) -> WeightUpdate:
        return replace(await super().prepare(version, probe), in_parts=True)

    async def parts(
        self, update: WeightUpdate, receivers: Callable[[], frozenset[int]]
    ) -> AsyncGenerator[Sequence[dict[str, Any]]]:
        """Export bucket after bucket; with ZeRO-3 all ranks gather each, so a GPU holds one gathered bucket."""
        await self._learner.call_all("start_export", update.version, self._bucket_bytes, timeout_s=self._timeout_s)
        try:
            while True:
                parts = await self._learner.call_all("export_part", receivers(), timeout_s=self._timeout_s)
                if parts[0] is None:
                    return
                yield parts
        finally:
            await self._learner.call_all("stop_export", timeout_s=self._timeout_s)


class ColocatedTransport(WeightTransport):
    """Publish from a learner that alternates with the engines on their GPUs.

    The learner moves its states to host memory in two steps, so that a GPU never holds more than the engine's
    weights and the learner's weights, or the engine alone:

        prepare     score the probe; everything but the weights leaves the GPU (with shm: the weights, too)
        release     the engines have the weights; the weights leave the GPU, before the engines wake their KV caches

    A worker that joins later reads a copy in shared memory. It is written from host memory, and only then: the next
    publish comes after the end of its start.

    Args:
        transport: Sends the weights.
    """

    def __init__(self, learner: Learner, transport: WeightTransport, timeout_s: float) -> None:
        self._learner, self._transport, self._timeout_s = learner, transport, timeout_s

    async def prepare(self, version: int, probe: ParityProbe | None = None) -> WeightUpdate:
        update = await self._transport.prepare(version, probe)
        await self._offload(keep_weights=not update.is_pull)
        return update

    def parts(
        self, update: WeightUpdate, receivers: Callable[[], frozenset[int]]
    ) -> AsyncGenerator[Sequence[dict[str, Any]]]:
        return self._transport.parts(update, receivers)

    async def release(self) -> None:
        await self._offload(keep_weights=False)

    async def copy(self, update: WeightUpdate) -> WeightUpdate | None:
        return await self._transport.copy(update)

    async def _offload(self, *, keep_weights: bool) -> None:
        await self._learner.call_all("offload_states", keep_weights, timeout_s=self._timeout_s)


class LearnerNcclTransport(_AnnouncedTransport):
    """Publish by NCCL broadcast.

    The members of an NCCL group are fixed. The group is reopened if the workers changed since the last
    publish or the learner was restarted. Workers outside the group read the copy in shared memory. Without
    a copy, a worker that joins between publishes receives the last announced version, if the learner still
    holds it.
    """

    def __init__(
        self,
        learner: Learner,
        tensor_parallel_size: int,
        timeout_s: float,
        fallback: LearnerShmTransport | None = None,
    ) -> None:
        super().__init__(learner, timeout_s, fallback)
        self._tensor_parallel_size = tensor_parallel_size
        self._members: tuple[int, list[str]] | None = None  # learner start, engine names

    async def connect(self, engines: Sequence[EngineClient]) -> None:
        """Open a group of rank 0 and `engines`, unless it is already open."""
        members = (self._learner.start_count, [engine.name for engine in engines])
        if members == self._members or not engines:
            return
        self._members = None
        address, port = await self._learner.rendezvous_address()
        topology = NcclTopology(address, port, len(engines), self._tensor_parallel_size)
        await asyncio.gather(
            self._learner.call_all("init_nccl_group", topology, timeout_s=self._timeout_s),
            *(engine.init_weight_transfer(topology.init_info(index)) for index, engine in enumerate(engines)),
        )
        self._members = members

    async def send(self, update: WeightUpdate) -> None:
        """Broadcast the announced weights."""
        try:
            await self._learner.call_all("start_broadcast", update.version, timeout_s=self._timeout_s)
            while not all(await self._learner.call_all("broadcast_done", timeout_s=self._timeout_s)):
                continue  # each call waits up to 0.2 s
        except BaseException:
            self._members = None  # an interrupted broadcast leaves the group unusable
            raise

    async def abort(self) -> None:
        """Close rank 0's end of the group, so that a running broadcast fails."""
        self._members = None
        await self._learner.call_all("abort_broadcast", timeout_s=self._timeout_s)
