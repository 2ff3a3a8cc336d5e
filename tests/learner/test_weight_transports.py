"""Who is in the NCCL group, and when it is opened anew: control logic alone, NCCL itself needs GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vz_ray.learner.weight_transports import LearnerNcclTransport, LearnerShmTransport
from vz_ray.weight_sync import WeightUpdate
from vz_ray.weight_sync.nccl_broadcast import NcclTopology


class RecordingLearner:
    """Stands for the learner's ranks: notes what is asked of all of them."""

    def __init__(self) -> None:
        self.start_count = 1
        self.calls: list[tuple[Any, ...]] = []
        self.broken: set[str] = set()
        self.answers: dict[str, list[Any]] = {}

    async def address(self) -> tuple[str, int]:
        return "learner", 29500 + len(self.calls)

    async def call_all(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        self.calls.append((method, *args))
        if method in self.broken:
            raise RuntimeError(f"{method} broke")
        later = self.answers.get(method)
        return later.pop(0) if later else [True]


class RecordingReceiver:
    def __init__(self, name: str) -> None:
        self.name = name
        self.init_infos: list[dict[str, Any]] = []

    async def init_weight_transfer(self, info: dict[str, Any]) -> None:
        self.init_infos.append(info)


def sender(ranks: RecordingLearner, tensor_parallel: int = 2) -> LearnerNcclTransport:
    return LearnerNcclTransport(ranks, tensor_parallel, None, 60.0)  # type: ignore[arg-type]


async def test_the_group_is_opened_anew_only_when_the_workers_are_others() -> None:
    ranks, a, b, c = (
        RecordingLearner(),
        RecordingReceiver("a"),
        RecordingReceiver("b"),
        RecordingReceiver("c"),
    )
    publishing = sender(ranks)
    for workers in ([a, b], [a, b], [a, c], [c]):
        await publishing.connect(workers)  # type: ignore[arg-type]
    assert ranks.calls == [
        ("init_nccl_group", NcclTopology("learner", 29500, 2, 2)),
        ("init_nccl_group", NcclTopology("learner", 29501, 2, 2)),
        ("init_nccl_group", NcclTopology("learner", 29502, 1, 2)),
    ]
    assert [(info["rank_offset"], info["world_size"]) for info in c.init_infos] == [(3, 5), (1, 3)]
    assert [(info["rank_offset"], info["world_size"]) for info in a.init_infos] == [(1, 5), (1, 5)]
    assert len(b.init_infos) == 1


async def test_a_learner_that_was_started_again_opens_the_group_anew() -> None:
    ranks, a = RecordingLearner(), RecordingReceiver("a")
    publishing = sender(ranks)
    for life in (1, 1, 2, 2):
        ranks.start_count = life
        await publishing.connect([a])  # type: ignore[list-item]
    assert len(a.init_infos) == len(ranks.calls) == 2


@pytest.mark.parametrize("method", ["init_nccl_group", "start_broadcast", "broadcast_done"])
async def test_a_group_that_broke_is_opened_anew(method: str) -> None:
    ranks, a = RecordingLearner(), RecordingReceiver("a")
    publishing = sender(ranks)
    ranks.broken = {method}

    async def publish() -> None:
        await publishing.connect([a])  # type: ignore[list-item]
        await publishing.send(WeightUpdate(1, "", {}, 0))

    with pytest.raises(RuntimeError, match=f"{method} broke"):
        await publish()
    ranks.broken = set()
    await publishing.connect([a])  # type: ignore[list-item]
    assert [asked[0] for asked in ranks.calls].count("init_nccl_group") == 2


async def test_a_broadcast_is_waited_for_until_every_rank_has_done_its_part() -> None:
    ranks = RecordingLearner()
    ranks.answers["broadcast_done"] = [[False, False], [False, True], [True, True]]
    await sender(ranks).send(WeightUpdate(4, "", {}, 0))
    assert [asked[0] for asked in ranks.calls] == [
        "start_broadcast",
        "broadcast_done",
        "broadcast_done",
        "broadcast_done",
    ]


async def test_an_aborted_group_is_opened_anew() -> None:
    ranks, a = RecordingLearner(), RecordingReceiver("a")
    publishing = sender(ranks)
    for _ in range(2):
        await publishing.connect([a])  # type: ignore[list-item]
        await publishing.abort()
    assert [asked[0] for asked in ranks.calls] == ["init_nccl_group", "abort_broadcast"] * 2


async def test_the_copy_of_a_version_has_its_probe_and_no_other_versions() -> None:
    ranks = RecordingLearner()
    copies = LearnerShmTransport(ranks, Path("/there"), 1, None, 60.0)  # type: ignore[arg-type]
    publishing = LearnerNcclTransport(ranks, 1, None, 60.0, copies)  # type: ignore[arg-type]
    ranks.answers["announce_weights"] = [[WeightUpdate(v, "", {"names": []}, 8, (-1.0 * v,))] for v in (1, 2)]
    ranks.answers["write_weights"] = [[WeightUpdate(v, "c", {"directory": f"/there/{v}"}, 8)] for v in (1, 2)]
    first, second = await publishing.prepare(1), await publishing.prepare(2)
    assert await publishing.copy(second) == WeightUpdate(2, "c", {"directory": "/there/2"}, 8, (-2.0,))
    assert await publishing.copy(first) is None
    assert not second.is_pull
