"""Weights by NCCL broadcast, learner rank 0 to every GPU of every engine.

Needs GPUs, and vLLM on the learner's machine too: both ends speak vLLM's packed
broadcast. The group has a fixed roster, so it is opened anew when workers
joined or left. Not exercised by the test suite, which runs without GPUs.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vz_ray.weight_sync.weight_source import WeightSource

BUCKET_BYTES = 1 << 30
_NUM_BUFFERS = 2


@dataclass(frozen=True, slots=True)
class NcclTopology:
    """Who takes part: learner rank 0, then the GPUs of each engine in order.

    Attributes:
        address: Of the learner, reachable from the engines.
        port: Free on the learner's machine.
        num_engines: How many there are.
        tensor_parallel_size: GPUs of each.
    """

    address: str
    port: int
    num_engines: int
    tensor_parallel_size: int = 1

    @property
    def world_size(self) -> int:
        return 1 + self.num_engines * self.tensor_parallel_size

    def init_info(self, engine_index: int) -> dict[str, Any]:
        """What the `engine_index`-th engine's `init_weights` is given."""
        return {
            "master_address": self.address,
            "master_port": self.port,
            "rank_offset": 1 + engine_index * self.tensor_parallel_size,
            "world_size": self.world_size,
            "packed": True,
            "packed_buffer_size_bytes": BUCKET_BYTES,
            "packed_num_buffers": _NUM_BUFFERS,
        }


def find_free_port() -> int:
    """A TCP port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def update_info(source: WeightSource) -> tuple[dict[str, Any], int]:
    """What vLLM's NCCL backend is told of the tensors that will come, and their bytes."""
    specs = source.specs()
    info = {
        "names": [spec.name for spec in specs],
        "dtype_names": [spec.dtype for spec in specs],
        "shapes": [list(spec.shape) for spec in specs],
    }
    return info, sum(spec.nbytes for spec in specs)


class NcclBroadcaster:
    """Learner rank 0's end of the broadcast.

    Other learner ranks must walk through the source's buckets at the same time
    where gathering them is collective.
    """

    def __init__(self) -> None:
        self._communicator: Any = None

    def open(self, topology: NcclTopology) -> None:
        """Joins the group; returns when all engines, told at the same time, have joined too."""
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        self.close()
        info = {
            "master_address": topology.address,
            "master_port": topology.port,
            "world_size": topology.world_size,
        }
        self._communicator = trainer_init(info)

    def broadcast(self, source: WeightSource) -> None:
        """Sends every tensor to all engines of the roster."""
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        if self._communicator is None:
            raise RuntimeError("no NCCL group: open one with the present roster first")
        packed_nccl_broadcast_producer(
            iterator=iter_gpu_tensors(source),
            group=self._communicator,
            src=0,
            post_iter_func=lambda item: item[1],
            buffer_size_bytes=BUCKET_BYTES,
            num_buffers=_NUM_BUFFERS,
        )

    def close(self) -> None:
        if self._communicator is not None:
            self._communicator.destroy()
            self._communicator = None


def iter_gpu_tensors(source: WeightSource) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a source, in its order, on this process's GPU."""
    for bucket in source.buckets(BUCKET_BYTES):
        for name, tensor in bucket.items():
            yield name, tensor.cuda()
