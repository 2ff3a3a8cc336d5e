"""Abort of an NCCL broadcast and change of its group, with a communicator that fails as vLLM's does.

A broadcast blocks until the peers take part or the communicator is destroyed. Destroying makes a blocked broadcast
return, and later broadcasts return without sending; neither raises an error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from vllm.distributed.weight_transfer import nccl_common, packed_tensor

from vz_ray.weight_sync import nccl_broadcast
from vz_ray.weight_sync.nccl_broadcast import NcclBroadcaster, NcclTopology
from vz_ray.weight_sync.weight_source import ModuleSource
from vz_ray.weight_sync.weight_store import WeightIntegrityError

TIMEOUT_S = 30.0


class FakeCommunicator:
    """Behaves as `PyNcclCommunicator` on the sender's side."""

    def __init__(self) -> None:
        self.sent: list[torch.Tensor] = []
        self.peers = threading.Event()
        self.peers.set()
        self.blocked = threading.Event()
        self.disabled = False

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        if self.disabled:
            return
        if not self.peers.is_set():
            self.blocked.set()
            assert self.peers.wait(TIMEOUT_S)
            return
        self.sent.append(tensor)

    def destroy(self) -> None:
        self.disabled = True
        self.peers.set()


def send_each(
    iterator: Iterator[tuple[str, torch.Tensor]],
    group: FakeCommunicator,
    src: int,
    post_iter_func: Callable[[Any], torch.Tensor],
    **buffers: int,
) -> None:
    """Stand-in for vLLM's packed producer, which needs CUDA streams: one broadcast for each tensor."""
    for item in iterator:
        group.broadcast(post_iter_func(item), src=src)


@pytest.fixture
def communicators(monkeypatch: pytest.MonkeyPatch) -> list[FakeCommunicator]:
    """Replace vLLM's NCCL calls; return the communicators in the order of their creation."""
    created: list[FakeCommunicator] = []

    def trainer_init(info: dict[str, Any]) -> FakeCommunicator:
        created.append(FakeCommunicator())
        return created[-1]

    def tensors(source: ModuleSource) -> Iterator[tuple[str, torch.Tensor]]:
        for bucket in source.buckets(1):
            yield from bucket.items()

    monkeypatch.setattr(nccl_common, "trainer_init", trainer_init)
    monkeypatch.setattr(packed_tensor, "packed_nccl_broadcast_producer", send_each)
    monkeypatch.setattr(nccl_broadcast, "iter_gpu_tensors", tensors)
    return created


@pytest.fixture
def source() -> ModuleSource:
    return ModuleSource(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)))


TOPOLOGY = NcclTopology("127.0.0.1", 1, num_engines=2)


def test_broadcast_sends_every_tensor(communicators, source) -> None:
    broadcaster = NcclBroadcaster()
    broadcaster.open(TOPOLOGY)
    broadcaster.broadcast(source)
    assert len(communicators[0].sent) == 4


def test_aborted_broadcast_fails(communicators, source) -> None:
    broadcaster = NcclBroadcaster()
    broadcaster.open(TOPOLOGY)
    communicators[0].peers.clear()  # a peer has died: the first broadcast blocks
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(broadcaster.broadcast, source)
        assert communicators[0].blocked.wait(TIMEOUT_S)
        broadcaster.abort()
        with pytest.raises(WeightIntegrityError, match="aborted"):
            sending.result(TIMEOUT_S)
    assert communicators[0].sent == []


def test_abort_during_the_last_tensor_fails(communicators, source, monkeypatch) -> None:
    """No tensor is left, so only the check after the last one can report the abort."""
    broadcaster = NcclBroadcaster()
    broadcaster.open(TOPOLOGY)

    def send_and_abort(group: FakeCommunicator, iterator: Iterator[Any], **arguments: Any) -> None:
        send_each(iterator, group, 0, arguments["post_iter_func"])
        broadcaster.abort()

    monkeypatch.setattr(packed_tensor, "packed_nccl_broadcast_producer", send_and_abort)
    with pytest.raises(WeightIntegrityError, match="aborted"):
        broadcaster.broadcast(source)


def test_group_works_after_an_abort(communicators, source) -> None:
    broadcaster = NcclBroadcaster()
    broadcaster.open(TOPOLOGY)
    broadcaster.abort()
    with pytest.raises(RuntimeError, match=r"call open\(\) first"):
        broadcaster.broadcast(source)
    broadcaster.open(TOPOLOGY)
    broadcaster.broadcast(source)
    assert len(communicators[1].sent) == 4


def test_reopening_destroys_the_old_communicator(communicators) -> None:
    broadcaster = NcclBroadcaster()
    for _ in range(5):
        broadcaster.open(TOPOLOGY)
    assert [communicator.disabled for communicator in communicators] == [True] * 4 + [False]
    broadcaster.close()
    broadcaster.close()
    assert communicators[-1].disabled


def test_engine_destroys_the_old_communicator(monkeypatch) -> None:
    from vllm.distributed.weight_transfer import nccl_engine

    from vz_ray.weight_sync.vllm_nccl import VerifiedNcclWeightTransferEngine

    created: list[FakeCommunicator] = []

    def join(info: Any, parallel_config: Any) -> FakeCommunicator:
        assert all(communicator.disabled for communicator in created)
        created.append(FakeCommunicator())
        return created[-1]

    monkeypatch.setattr(nccl_engine, "worker_init_process_group", join)
    engine = VerifiedNcclWeightTransferEngine.__new__(VerifiedNcclWeightTransferEngine)
    engine.model_update_group, engine.parallel_config = None, None
    for index in range(3):
        engine.init_transfer_engine(engine.init_info_cls(**TOPOLOGY.init_info(index % 2)))
    assert [communicator.disabled for communicator in created] == [True, True, False]
