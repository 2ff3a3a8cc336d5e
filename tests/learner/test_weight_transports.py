"""Members of the NCCL group and when it is reopened; NCCL itself needs GPUs and is not used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vz_ray.learner.weight_transports import (
    ColocatedTransport,
    LearnerIpcTransport,
    LearnerNcclTransport,
    LearnerShmTransport,
)
from vz_ray.weight_sync import ProbeScore, WeightUpdate
from vz_ray.weight_sync.nccl_broadcast import NcclTopology


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


async def test_fallback_copy_is_of_the_newest_version_only() -> None:
    learner = RecordingLearner()
    fallback = LearnerShmTransport(learner, Path("/there"), 1, 60.0)  # type: ignore[arg-type]
    transport = LearnerNcclTransport(learner, 1, 60.0, fallback)  # type: ignore[arg-type]
    learner.answers["announce_weights"] = [
        [WeightUpdate(v, "", {"names": []}, 8, ProbeScore(1, (-1.0 * v,)))] for v in (1, 2)
    ]
    learner.answers["write_weights"] = [[WeightUpdate(v, "c", {"directory": f"/there/{v}"}, 8)] for v in (1, 2)]
    first, second = await transport.prepare(1), await transport.prepare(2)
    assert await transport.copy(second) == WeightUpdate(2, "c", {"directory": "/there/2"}, 8, ProbeScore(1, (-2.0,)))
    assert await transport.copy(first) is None
    assert not second.is_pull


async def publish_colocated(transport: str) -> tuple[ColocatedTransport, RecordingLearner, WeightUpdate]:
    """Prepare, send and release version 1; return the transport, its learner and the update."""
    learner = RecordingLearner()
    learner.answers["announce_weights"] = [[WeightUpdate(1, "", {}, 8, ProbeScore(1, (-1.0,)))] * 2]
    learner.answers["write_weights"] = [[WeightUpdate(1, "c", {"directory": "/there/1"}, 8), None]]
    learner.answers["export_part"] = [[{"part": 0}, {"part": 0}], [None, None]]
    shm = LearnerShmTransport(learner, Path("/there"), 7, 60.0)  # type: ignore[arg-type]
    ipc = LearnerIpcTransport(learner, 60.0, bucket_bytes=7)  # type: ignore[arg-type]
    colocated = ColocatedTransport(learner, {"ipc": ipc, "shm": shm}[transport], shm, 60.0)  # type: ignore[arg-type]
    update = await colocated.prepare(1)
    if update.in_parts:
        assert [parts async for parts in colocated.parts(update)] == [[{"part": 0}, {"part": 0}]]
    await colocated.release()
    return colocated, learner, update


async def test_colocated_ipc_keeps_only_weights_until_engines_have_them() -> None:
    transport, learner, update = await publish_colocated("ipc")
    assert learner.calls == [
        ("announce_weights", 1, None),
        ("offload_states", True),
        ("start_export", 1, 7),
        ("export_part",),
        ("export_part",),
        ("stop_export",),
        ("offload_states", False),
    ]
    for _ in range(2):  # two workers join; the copy is written for the first
        copy = await transport.copy(update)
        assert copy == WeightUpdate(1, "c", {"directory": "/there/1"}, 8, ProbeScore(1, (-1.0,)))
    assert learner.calls[7:] == [("write_weights", 1, Path("/there"), 7, None)]


async def test_colocated_shm_leaves_the_gpu_before_engines_wake() -> None:
    transport, learner, update = await publish_colocated("shm")
    assert [call[0] for call in learner.calls] == ["write_weights", "offload_states", "offload_states"]
    assert learner.calls[1] == ("offload_states", False)
    assert await transport.copy(update) is update


async def test_interrupted_export_frees_its_bucket() -> None:
    learner = RecordingLearner()
    learner.answers["export_part"] = [[{"part": 0}]]
    parts = LearnerIpcTransport(learner, 60.0, bucket_bytes=7).parts(WeightUpdate(1, "", {}, 8))  # type: ignore[arg-type]
    await anext(parts)
    await parts.aclose()
    assert [call[0] for call in learner.calls] == ["start_export", "export_part", "stop_export"]
