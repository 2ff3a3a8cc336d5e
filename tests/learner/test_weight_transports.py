"""Members of the NCCL group and when it is reopened; NCCL itself needs GPUs and is not used."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vz_ray.config.rollout import WeightsConfig
from vz_ray.learner.weight_transports import (
    LearnerIpcTransport,
    LearnerNcclTransport,
    LearnerShmTransport,
    create_weight_transport,
)
from vz_ray.weight_sync import ProbeScore, WeightPublisher, WeightTransport, WeightUpdate
from vz_ray.weight_sync.nccl_broadcast import NcclTopology
from vz_ray.weight_sync.weight_source import CollectiveSource, ModuleSource


class RecordingLearner:
    """Fake learner that records the calls to all learner."""

    def __init__(self) -> None:
        self.start_count = 1
        self.calls: list[tuple[Any, ...]] = []
        self.broken: set[str] = set()
        self.answers: dict[str, list[Any]] = {}

    async def rendezvous_address(self) -> tuple[str, int]:
        return "learner", 29500 + len(self.calls)

    async def call_all(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        self.calls.append((method, *args))
        if method in self.broken:
            raise RuntimeError(f"{method} broke")
        later = self.answers.get(method)
        return later.pop(0) if later else [True]


class RecordingEngine:
    def __init__(self, name: str) -> None:
        self.name = name
        self.init_infos: list[dict[str, Any]] = []

    async def init_weight_transfer(self, info: dict[str, Any]) -> None:
        self.init_infos.append(info)


def nccl_transport(learner: RecordingLearner, tensor_parallel: int = 2) -> LearnerNcclTransport:
    return LearnerNcclTransport(learner, tensor_parallel, 60.0)  # type: ignore[arg-type]


async def test_group_is_reopened_only_for_other_workers() -> None:
    learner, a, b, c = (
        RecordingLearner(),
        RecordingEngine("a"),
        RecordingEngine("b"),
        RecordingEngine("c"),
    )
    transport = nccl_transport(learner)
    for workers in ([a, b], [a, b], [a, c], [c]):
        await transport.connect(workers)  # type: ignore[arg-type]
    assert learner.calls == [
        ("init_nccl_group", NcclTopology("learner", 29500, 2, 2)),
        ("init_nccl_group", NcclTopology("learner", 29501, 2, 2)),
        ("init_nccl_group", NcclTopology("learner", 29502, 1, 2)),
    ]
    assert [(info["rank_offset"], info["world_size"]) for info in c.init_infos] == [(3, 5), (1, 3)]
    assert [(info["rank_offset"], info["world_size"]) for info in a.init_infos] == [(1, 5), (1, 5)]
    assert len(b.init_infos) == 1


async def test_restarted_learner_reopens_the_group() -> None:
    learner, a = RecordingLearner(), RecordingEngine("a")
    transport = nccl_transport(learner)
    for start_count in (1, 1, 2, 2):
        learner.start_count = start_count
        await transport.connect([a])  # type: ignore[list-item]
    assert len(a.init_infos) == len(learner.calls) == 2


@pytest.mark.parametrize("method", ["init_nccl_group", "start_broadcast", "broadcast_done"])
async def test_failed_call_reopens_the_group(method: str) -> None:
    learner, a = RecordingLearner(), RecordingEngine("a")
    transport = nccl_transport(learner)
    learner.broken = {method}

    async def publish() -> None:
        await transport.connect([a])  # type: ignore[list-item]
        await transport.send(WeightUpdate(1, "", {}, 0))

    with pytest.raises(RuntimeError, match=f"{method} broke"):
        await publish()
    learner.broken = set()
    await transport.connect([a])  # type: ignore[list-item]
    assert [call[0] for call in learner.calls].count("init_nccl_group") == 2


async def test_send_waits_until_all_ranks_have_finished() -> None:
    learner = RecordingLearner()
    learner.answers["broadcast_done"] = [[False, False], [False, True], [True, True]]
    await nccl_transport(learner).send(WeightUpdate(4, "", {}, 0))
    assert [call[0] for call in learner.calls] == [
        "start_broadcast",
        "broadcast_done",
        "broadcast_done",
        "broadcast_done",
    ]


async def test_abort_reopens_the_group() -> None:
    learner, a = RecordingLearner(), RecordingEngine("a")
    transport = nccl_transport(learner)
    for _ in range(2):
        await transport.connect([a])  # type: ignore[list-item]
        await transport.abort()
    assert [call[0] for call in learner.calls] == ["init_nccl_group", "abort_broadcast"] * 2


class CopyingLearner(RecordingLearner):
    """Fake learner that announces any version and writes copies when `allowed` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed = asyncio.Event()
        self.allowed.set()

    async def call_all(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        await super().call_all(method, *args, timeout_s=timeout_s)
        if method == "announce_weights":
            return [WeightUpdate(args[0], "", {"names": []}, 8, ProbeScore(1, (-1.0 * args[0],)))]
        if method == "write_copy":
            await self.allowed.wait()
            return [WeightUpdate(args[0], "c", {"directory": f"/there/{args[0]}"}, 8)]
        return [True]

    def count(self, method: str) -> int:
        return [call[0] for call in self.calls].count(method)


def copying_transport(learner: CopyingLearner) -> LearnerNcclTransport:
    fallback = LearnerShmTransport(learner, Path("/there"), 1, 60.0)  # type: ignore[arg-type]
    return LearnerNcclTransport(learner, 1, 60.0, fallback)  # type: ignore[arg-type]


def expected_copy(version: int) -> WeightUpdate:
    return WeightUpdate(version, "c", {"directory": f"/there/{version}"}, 8, ProbeScore(1, (-1.0 * version,)))


async def test_copy_is_written_after_delivery_only() -> None:
    learner = CopyingLearner()
    transport = copying_transport(learner)
    update = await transport.prepare(1)
    await transport.send(update)
    assert learner.count("write_copy") == 0
    transport.start_copy(update)
    assert await transport.copy(update) == expected_copy(1)
    assert learner.count("write_copy") == 1
    assert not update.is_pull


async def test_joining_workers_share_the_copy_being_written() -> None:
    learner = CopyingLearner()
    transport = copying_transport(learner)
    update = await transport.prepare(1)
    learner.allowed.clear()
    transport.start_copy(update)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(transport.copy(update), 0.01)
    others = [asyncio.create_task(transport.copy(update)) for _ in range(2)]
    learner.allowed.set()
    assert await asyncio.gather(*others) == [expected_copy(1)] * 2
    assert learner.count("write_copy") == 1


async def test_copy_is_of_the_newest_version_only() -> None:
    transport = copying_transport(CopyingLearner())
    first, second = await transport.prepare(1), await transport.prepare(2)
    # Not started after delivery: an engine on a spot node pulls during the publish.
    assert await transport.copy(second) == expected_copy(2)
    assert await transport.copy(first) is None


async def test_failed_copy_is_logged_and_does_not_stop_publishes(caplog: pytest.LogCaptureFixture) -> None:
    learner = CopyingLearner()
    transport = copying_transport(learner)
    update = await transport.prepare(1)
    learner.broken = {"write_copy"}
    transport.start_copy(update)
    assert await transport.copy(update) is None
    assert "No copy of weight version 1 in shared memory: write_copy broke" in caplog.text
    learner.broken = set()
    assert await transport.copy(await transport.prepare(2)) == expected_copy(2)


async def test_copies_can_be_disabled() -> None:
    learner = CopyingLearner()
    transport = nccl_transport(learner)
    update = await transport.prepare(1)
    transport.start_copy(update)
    assert await transport.copy(update) is None
    assert learner.count("write_copy") == 0


async def test_publisher_starts_the_copy_when_the_engines_generate_again() -> None:
    class Engine(RecordingEngine):
        pulls_weights = False

        async def resume(self) -> None:
            assert learner.count("write_copy") == 0

        async def step(self, *args: Any) -> None:
            return None

        pause = receive_weights = resume_engine = step

    learner = CopyingLearner()
    transport, publisher = copying_transport(learner), WeightPublisher(timeout_s=5.0)
    await publisher.publish(1, transport, [Engine("a")])  # type: ignore[list-item]
    assert publisher.current is not None
    late = Engine("late")
    await publisher.deliver(publisher.current, [late], transport=transport, joining=True)  # type: ignore[list-item]
    assert learner.count("write_copy") == 1
    assert learner.count("start_broadcast") == 1


class FailingReader(RuntimeError):
    pass


def fail_after(source: CollectiveSource, num_buckets: int) -> None:
    buckets = source.buckets(1)
    for _ in range(num_buckets):
        next(buckets)
    raise FailingReader


def test_remaining_buckets_are_gathered_after_an_error() -> None:
    gathered: list[str] = []

    class Source(ModuleSource):
        def buckets(self, max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
            for bucket in super().buckets(max_bytes):
                gathered.extend(bucket)
                yield bucket

    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    for num_read in (0, 1, 4):
        gathered.clear()
        source = CollectiveSource(Source(module), 1)
        with pytest.raises(FailingReader), source.gathered_to_the_end():
            fail_after(source, num_read)
        assert gathered == names


async def publish_colocated(transport: str) -> tuple[WeightTransport, RecordingLearner, WeightUpdate]:
    """Prepare, send and release version 1; return the transport, its learner and the update."""
    learner = RecordingLearner()
    copy = WeightUpdate(1, "c", {"directory": "/there/1"}, 8)
    learner.answers["announce_weights"] = [[WeightUpdate(1, "", {}, 8, ProbeScore(1, (-1.0,)))] * 2]
    learner.answers["write_weights"] = learner.answers["write_copy"] = [[copy, None]]
    learner.answers["export_part"] = [[{"part": 0}, {"part": 0}], [None, None]]
    weights = WeightsConfig(transport=transport, keep_shm_copy=False, bucket_mib=1, timeout_s=60.0)
    colocated = create_weight_transport(learner, weights, Path("/there"), 1, colocate=True)  # type: ignore[arg-type]
    update = await colocated.prepare(1)
    if update.in_parts:
        assert [parts async for parts in colocated.parts(update, lambda: frozenset({0}))] == [
            [{"part": 0}, {"part": 0}]
        ]
    await colocated.release()
    return colocated, learner, update


async def test_colocated_ipc_keeps_only_weights_until_engines_have_them() -> None:
    transport, learner, update = await publish_colocated("ipc")
    assert learner.calls == [
        ("announce_weights", 1, None),
        ("offload_states", True),
        ("start_export", 1, 2**20),
        ("export_part", {0}),
        ("export_part", {0}),
        ("stop_export",),
        ("offload_states", False),
    ]
    for _ in range(2):  # two workers join; the copy is written for the first
        copy = await transport.copy(update)
        assert copy == WeightUpdate(1, "c", {"directory": "/there/1"}, 8, ProbeScore(1, (-1.0,)))
    assert learner.calls[7:] == [("write_copy", 1, Path("/there"), 2**20)]


async def test_colocated_shm_leaves_the_gpu_before_engines_wake() -> None:
    transport, learner, update = await publish_colocated("shm")
    assert [call[0] for call in learner.calls] == ["write_weights", "offload_states", "offload_states"]
    assert learner.calls[1] == ("offload_states", False)
    assert await transport.copy(update) is update


async def test_interrupted_export_frees_its_bucket() -> None:
    learner = RecordingLearner()
    learner.answers["export_part"] = [[{"part": 0}]]
    transport = LearnerIpcTransport(learner, 60.0, bucket_bytes=7)  # type: ignore[arg-type]
    parts = transport.parts(WeightUpdate(1, "", {}, 8), lambda: frozenset({0}))
    await anext(parts)
    await parts.aclose()
    assert [call[0] for call in learner.calls] == ["start_export", "export_part", "stop_export"]
