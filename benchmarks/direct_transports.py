"""Weight transports between GPUs whose learner is a module of this process, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from vz_ray.utils.ports import find_free_port
from vz_ray.weight_sync import EngineClient, ParityProbe, ProbeScore, WeightSource, WeightTransport, WeightUpdate
from vz_ray.weight_sync.ipc_handles import IpcExporter
from vz_ray.weight_sync.nccl_broadcast import NcclBroadcaster, NcclTopology, update_info

ScoreFn = Callable[[ParityProbe], ProbeScore]


class IpcTransport(WeightTransport):
    """Publish in parts to an engine on the same GPU, by CUDA IPC; on CPU through memory of this process."""

    def __init__(self, source: WeightSource, score_probe: ScoreFn, *, bucket_bytes: int = 256 << 20) -> None:
        self._source, self._score_probe, self._bucket_bytes = source, score_probe, bucket_bytes
        self._exporter = IpcExporter()

    async def prepare(self, version: int, probe: ParityProbe | None = None) -> WeightUpdate:
        info, nbytes = update_info(self._source)
        score = self._score_probe(probe) if probe else None
        return WeightUpdate(version, "", info, nbytes, score, in_parts=True)

    async def parts(
        self, update: WeightUpdate, receivers: Callable[[], frozenset[int]]
    ) -> AsyncGenerator[Sequence[dict[str, Any]]]:
        self._exporter.start(self._source, self._bucket_bytes)
        try:
            while (part := self._exporter.next_part(has_receiver=bool(receivers()))) is not None:
                yield [part]
        finally:
            self._exporter.stop()


class NcclTransport(WeightTransport):
    """Publish by NCCL broadcast to engines on other GPUs.

    Attributes:
        broadcaster: Sender. `connect` opens a new group if `reopen` is true, which it is at first.
    """

    def __init__(self, source: WeightSource, score_probe: ScoreFn) -> None:
        self._source, self._score_probe = source, score_probe
        self.broadcaster, self.reopen = NcclBroadcaster(), True

    async def prepare(self, version: int, probe: ParityProbe | None = None) -> WeightUpdate:
        info, nbytes = update_info(self._source)
        return WeightUpdate(version, "", info, nbytes, self._score_probe(probe) if probe else None)

    async def connect(self, engines: Sequence[EngineClient]) -> None:
        if not self.reopen:
            return
        topology = NcclTopology("127.0.0.1", find_free_port("127.0.0.1"), len(engines))
        await asyncio.gather(
            asyncio.to_thread(self.broadcaster.open, topology),
            *(engine.init_weight_transfer(topology.init_info(index)) for index, engine in enumerate(engines)),
        )
        self.reopen = False

    async def send(self, update: WeightUpdate) -> None:
        try:
            await asyncio.to_thread(self.broadcaster.broadcast, self._source)
        except BaseException:
            self.reopen = True
            raise

    async def abort(self) -> None:
        self.broadcaster.abort()
        self.reopen = True
