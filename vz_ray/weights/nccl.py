"""Weights by NCCL broadcast, learner rank 0 to every GPU of every engine.

Needs GPUs, and vLLM on the learner's machine too: both ends speak vLLM's packed
broadcast. The group has a fixed roster, so it is opened anew when workers
joined or left. Not exercised by the test suite, which runs without GPUs.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vz_ray.weights.publisher import Update
from vz_ray.weights.source import WeightSource

BUCKET_BYTES = 1 << 30
_BUFFERS = 2


@dataclass(frozen=True, slots=True)
class Roster:
    """Who takes part: learner rank 0, then the GPUs of each engine in order.

    Attributes:
        address: Of the learner, reachable from the engines.
        port: Free on the learner's machine.
        engines: How many there are.
        tensor_parallel: GPUs of each.
    """

    address: str
    port: int
    engines: int
    tensor_parallel: int = 1

    @property
    def world_size(self) -> int:
        return 1 + self.engines * self.tensor_parallel

    def init_info(self, engine: int) -> dict[str, Any]:
        """What the `engine`-th engine's `init_weights` is given."""
        return {
            "master_address": self.address,
            "master_port": self.port,
            "rank_offset": 1 + engine * self.tensor_parallel,
            "world_size": self.world_size,
            "packed": True,
            "packed_buffer_size_bytes": BUCKET_BYTES,
            "packed_num_buffers": _BUFFERS,
        }


def free_port() -> int:
    """A TCP port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


class NcclSender:
    """Broadcasts a source's tensors; lives in learner rank 0.

    Other learner ranks must walk through the source's buckets at the same time
    where gathering them is collective.
    """

    def __init__(self, source: WeightSource, score: Callable[[], tuple[float, ...]] | None = None) -> None:
        self._source, self._score = source, score
        self._group: Any = None

    async def open(self, roster: Roster) -> None:
        """Joins the group; returns when all engines, told at the same time, have joined too."""
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        self.close()
        info = {"master_address": roster.address, "master_port": roster.port, "world_size": roster.world_size}
        self._group = await asyncio.to_thread(trainer_init, info)

    async def prepare(self, version: int) -> Update:
        specs = self._source.specs()
        info = {
            "names": [spec.name for spec in specs],
            "dtype_names": [spec.dtype for spec in specs],
            "shapes": [list(spec.shape) for spec in specs],
        }
        expected = await asyncio.to_thread(self._score) if self._score else None
        return Update(version, "", info, sum(spec.nbytes for spec in specs), expected)

    async def send(self, update: Update) -> None:
        if self._group is None:
            raise RuntimeError("no NCCL group: open one with the present roster first")
        await asyncio.to_thread(self._broadcast)

    def close(self) -> None:
        if self._group is not None:
            self._group.destroy()
            self._group = None

    def _broadcast(self) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        packed_nccl_broadcast_producer(
            iterator=self._tensors(),
            group=self._group,
            src=0,
            post_iter_func=lambda item: item[1],
            buffer_size_bytes=BUCKET_BYTES,
            num_buffers=_BUFFERS,
        )

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for bucket in self._source.buckets(BUCKET_BYTES):
            for name, tensor in bucket.items():
                yield name, tensor.cuda()
