"""The learner's side of a publish, by transport; see `vz_ray.weight_sync.transport`.

shm     rank 0 writes each version to shared memory, and workers pull it
nccl    rank 0 broadcasts to a group of all workers
ipc     rank 0 lends its memory to an engine on the same GPU

With the last two, a copy in shared memory can be kept for workers that are in no group.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vz_ray.config.weights import WeightsConfig
from vz_ray.learner.learner import Learner
from vz_ray.weight_sync import EngineClient, WeightTransport, WeightUpdate
from vz_ray.weight_sync.nccl_broadcast import NcclTopology
from vz_ray.weight_sync.parity_probe import ParityProbe


def create_weight_transport(
    group: Learner, config: WeightsConfig, store: Path, probe: ParityProbe, tensor_parallel: int
) -> WeightTransport:
    """The sender that `config` asks for; `store` is where versions in shared memory lie."""
    bucket_bytes, deadline_s = config.bucket_mib * 2**20, config.timeout_s
    if config.transport == "shm":
        return LearnerShmTransport(group, store, bucket_bytes, probe, deadline_s)
    copies = (
        LearnerShmTransport(group, store, bucket_bytes, None, deadline_s) if config.keep_shm_copy else None
    )
    if config.transport == "ipc":
        return LearnerIpcTransport(group, probe, deadline_s, copies)
    return LearnerNcclTransport(group, tensor_parallel, probe, deadline_s, copies)


class ShmFallback:
    """The newest version in shared memory, for who cannot be sent it; without `writer` none is kept."""

    def __init__(self, writer: LearnerShmTransport | None) -> None:
        self._writer = writer
        self._kept: WeightUpdate | None = None

    async def save(self, update: WeightUpdate) -> None:
        """Writes the weights that were announced as `update`."""
        if self._writer is not None:
            copy = await self._writer.prepare(update.version)
            self._kept = replace(copy, expected_logprobs=update.expected_logprobs)

    def get(self, update: WeightUpdate) -> WeightUpdate | None:
        """The copy of that version, if it is the newest."""
        same = self._kept is not None and self._kept.version == update.version
        return self._kept if same else None


class LearnerShmTransport(WeightTransport):
    """The learner's side of a publish through shared memory; see `vz_ray.weight_sync.transport`."""

    def __init__(
        self, group: Learner, root: Path, bucket_bytes: int, probe: ParityProbe | None, deadline_s: float
    ) -> None:
        self._group, self._root, self._bucket_bytes, self._probe = group, root, bucket_bytes, probe
        self._deadline_s = deadline_s

    async def prepare(self, version: int) -> WeightUpdate:
        """Writes the present weights as `version`, and scores the probe with them."""
        what = (version, self._root, self._bucket_bytes, self._probe)
        answers = await self._group.call_all("write_weights", *what, timeout_s=self._deadline_s)
        update: WeightUpdate = answers[0]
        return update


class LearnerNcclTransport(WeightTransport):
    """The learner's side of a publish by NCCL; see `vz_ray.weight_sync.transport`.

    The group's roster is fixed, so it is opened anew whenever the workers are
    not the ones of the last publish, or the learner was started again. Workers
    that are in no group pull the copies of `copies`, which writes the same
    versions to shared memory. Without it, one that joins between publishes is
    sent the version that was announced last, if the learner still holds it.
    """

    def __init__(
        self,
        group: Learner,
        tensor_parallel: int,
        probe: ParityProbe | None,
        deadline_s: float,
        fallback: LearnerShmTransport | None = None,
    ) -> None:
        self._group, self._tensor_parallel, self._probe = group, tensor_parallel, probe
        self._deadline_s = deadline_s
        self._copies = ShmFallback(fallback)
        self._joined: tuple[int, list[str]] | None = None

    async def prepare(self, version: int) -> WeightUpdate:
        """Announces the present weights as `version`, and scores the probe with them."""
        what = (version, self._probe)
        answers = await self._group.call_all("announce_weights", *what, timeout_s=self._deadline_s)
        update: WeightUpdate = answers[0]
        await self._copies.save(update)
        return update

    async def copy(self, update: WeightUpdate) -> WeightUpdate | None:
        """The copy in shared memory of rank 0's node, if copies are kept."""
        return self._copies.get(update)

    async def connect(self, engines: Sequence[EngineClient]) -> None:
        """Opens a group of rank 0 and these workers, unless they are the ones that it has."""
        joined = (self._group.start_count, [engine.name for engine in engines])
        if joined == self._joined or not engines:
            return
        self._joined = None
        address, port = await self._group.address()
        roster = NcclTopology(address, port, len(engines), self._tensor_parallel)
        await asyncio.gather(
            self._group.call_all("init_nccl_group", roster, timeout_s=self._deadline_s),
            *(engine.init_weight_transfer(roster.init_info(index)) for index, engine in enumerate(engines)),
        )
        self._joined = joined

    async def send(self, update: WeightUpdate) -> None:
        """Broadcasts what was announced."""
        try:
            await self._group.call_all("start_broadcast", update.version, timeout_s=self._deadline_s)
            while not all(await self._group.call_all("broadcast_done", timeout_s=self._deadline_s)):
                continue  # each rank waits for its part for a moment
        except BaseException:
            self._joined = None  # a broadcast that broke off leaves the group unusable
            raise

    async def abort(self) -> None:
        """Rank 0 leaves the group, so that a broadcast to it fails."""
        self._joined = None
        await self._group.call_all("abort_broadcast", timeout_s=self._deadline_s)


class LearnerIpcTransport(WeightTransport):
    """The learner's side of a publish on one GPU that it shares with the engine."""

    def __init__(
        self,
        group: Learner,
        probe: ParityProbe | None,
        deadline_s: float,
        fallback: LearnerShmTransport | None = None,
    ) -> None:
        self._group, self._probe, self._deadline_s = group, probe, deadline_s
        self._copies = ShmFallback(fallback)

    async def prepare(self, version: int) -> WeightUpdate:
        """Lends the present weights as `version`, and scores the probe with them."""
        answers = await self._group.call_all(
            "export_ipc_handles", version, self._probe, timeout_s=self._deadline_s
        )
        update: WeightUpdate = answers[0]
        await self._copies.save(update)
        return update

    async def copy(self, update: WeightUpdate) -> WeightUpdate | None:
        """A joiner must not read what the learner may be changing: it pulls a copy, if copies are kept."""
        return self._copies.get(update)
