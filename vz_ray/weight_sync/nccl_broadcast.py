"""NCCL broadcast of weights from learner rank 0 to every GPU of every engine.

Needs GPUs, and vLLM on the learner's machine: both sides use vLLM's packed broadcast. The NCCL group
has fixed members, so it is reopened when workers join or leave. The test suite runs without GPUs and
does not cover the broadcast.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vz_ray.weight_sync.weight_source import WeightSource
from vz_ray.weight_sync.weight_store import WeightIntegrityError

BUCKET_BYTES = 1 << 30
_NUM_BUFFERS = 2


@dataclass(frozen=True, slots=True)
class NcclTopology:
    """Members of the NCCL group: learner rank 0, then the GPUs of each engine in order.

    Attributes:
        address: Address of the learner, reachable from the engines.
        port: Free TCP port on the learner's machine.
        num_engines: Number of engines.
        tensor_parallel_size: GPUs per engine.
    """

    address: str
    port: int
    num_engines: int
    tensor_parallel_size: int = 1

    @property
    def world_size(self) -> int:
        return 1 + self.num_engines * self.tensor_parallel_size

    def init_info(self, engine_index: int) -> dict[str, Any]:
        """Return the argument of `init_weight_transfer` for an engine."""
        return {
            "master_address": self.address,
            "master_port": self.port,
            "rank_offset": 1 + engine_index * self.tensor_parallel_size,
            "world_size": self.world_size,
            "packed": True,
            "packed_buffer_size_bytes": BUCKET_BYTES,
            "packed_num_buffers": _NUM_BUFFERS,
        }


def update_info(source: WeightSource) -> tuple[dict[str, Any], int]:
    """Return the `update_info` of vLLM's NCCL backend, and the size of the weights in bytes."""
    specs = source.specs()
    info = {
        "names": [spec.name for spec in specs],
        "dtype_names": [spec.dtype for spec in specs],
        "shapes": [list(spec.shape) for spec in specs],
    }
    return info, sum(spec.nbytes for spec in specs)


class NcclBroadcaster:
    """Sender of the broadcast, on learner rank 0.

    If gathering a bucket is collective (ZeRO-3), the other learner ranks must iterate over the buckets
    at the same time.
    """

    def __init__(self) -> None:
        self._communicator: Any = None
        self._aborted = threading.Event()

    def open(self, topology: NcclTopology) -> None:
        """Open the NCCL group. Blocks until all engines have joined."""
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        self.close()
        self._aborted.clear()
        info = {
            "master_address": topology.address,
            "master_port": topology.port,
            "world_size": topology.world_size,
        }
        self._communicator = trainer_init(info)

    def broadcast(self, source: WeightSource) -> None:
        """Send every tensor to all engines.

        Raises:
            WeightIntegrityError: `abort` was called from another thread.
        """
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        if self._communicator is None:
            raise RuntimeError("the NCCL group is not open; call open() first")
        packed_nccl_broadcast_producer(
            iterator=self._until_aborted(iter_gpu_tensors(source)),
            group=self._communicator,
            src=0,
            post_iter_func=lambda item: item[1],
            buffer_size_bytes=BUCKET_BYTES,
            num_buffers=_NUM_BUFFERS,
        )
        self._check_not_aborted()

    def abort(self) -> None:
        """Make a `broadcast` in another thread fail, and close the group.

        A closed communicator skips further broadcasts without an error, so the flag alone reports the abort.
        """
        self._aborted.set()
        self.close()

    def close(self) -> None:
        """Close the group. Idempotent."""
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            communicator.destroy()

    def _until_aborted(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for item in tensors:
            self._check_not_aborted()
            yield item

    def _check_not_aborted(self) -> None:
        if self._aborted.is_set():
            raise WeightIntegrityError("the broadcast was aborted")


def iter_gpu_tensors(source: WeightSource) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and tensors of a source in order, moved to this process's GPU."""
    for bucket in source.buckets(BUCKET_BYTES):
        for name, tensor in bucket.items():
            yield name, tensor.cuda()
