"""Who plays on after a publish, and who does not: control logic only, so the workers are scripted."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from vz_ray.observe.deadline import Overdue
from vz_ray.weights import Probe, Publisher, Update, WeightsBroken

PROBE = Probe((1,), (1,), (np.zeros((28, 28, 3), np.uint8),), (2, 3), 0)


class Worker:
    def __init__(self, name: str, scores: Sequence[Sequence[float]] = ((-1.0, -2.0),)) -> None:
        self.name = name
        self.pulls = False
        self.got: list[Update] = []
        self.did: list[str] = []
        self.broken: dict[str, Any] = {}
        self._scores = [list(score) for score in scores]

    async def _do(self, what: str) -> None:
        self.did.append(what)
        trouble = self.broken.get(what)
        if isinstance(trouble, Exception):
            raise trouble
        if trouble == "hang":
            await asyncio.Event().wait()

    async def pause(self) -> None:
        await self._do("pause")

    async def receive(self, update: Update) -> None:
        self.got.append(update)
        await self._do("receive")

    async def thaw(self) -> None:
        await self._do("thaw")

    async def score(self, probe: Probe) -> Sequence[float]:
        await self._do("score")
        return self._scores.pop(0) if len(self._scores) > 1 else self._scores[0]

    async def resume(self) -> None:
        await self._do("resume")


class Sender:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    async def prepare(self, version: int) -> Update:
        return Update(version, "c", {}, 8, (-1.0, -2.0))

    async def connect(self, workers: Sequence[Any]) -> None:
        return None

    async def send(self, update: Update) -> None:
        if self.error:
            raise self.error

    async def abort(self) -> None:
        return None

    async def copy(self, update: Update) -> Update | None:
        return None


def publisher(**options: Any) -> Publisher:
    return Publisher(**{"deadline_s": 5.0, "probe": PROBE, **options})


async def test_each_worker_goes_through_every_step_in_order() -> None:
    workers = [Worker("a"), Worker("b")]
    report = await publisher().publish(1, Sender(), workers)
    assert [w.did for w in workers] == [["pause", "receive", "thaw", "score", "score", "resume"]] * 2
    assert report.updated == ("a", "b")
    assert report.failed == {}
    assert report.probe_gap == 0
    assert report.pause_s + report.receive_s + report.probe_s <= report.sync_s


@pytest.mark.parametrize("step", ["pause", "receive", "thaw", "score"])
@pytest.mark.parametrize("trouble", [RuntimeError("bad tensor"), "hang"])
async def test_a_worker_that_fails_is_never_resumed_and_the_others_go_on(step: str, trouble: Any) -> None:
    workers = [Worker("a"), Worker("b"), Worker("c")]
    workers[1].broken[step] = trouble
    report = await publisher(deadline_s=0.05).publish(1, Sender(), workers)
    assert report.updated == ("a", "c")
    assert list(report.failed) == ["b"]
    assert ("bad tensor" if trouble != "hang" else "b did not finish") in report.failed["b"]
    assert workers[1].did[-1] == step
    assert workers[0].did[-1] == workers[2].did[-1] == "resume"


@pytest.mark.parametrize("score", [(-1.0, -2.1), (-1.0, float("nan")), (float("nan"), -2.0)])
async def test_a_worker_that_computes_something_else_is_out(score: tuple[float, float]) -> None:
    workers = [Worker("a"), Worker("b", [score])]
    report = await publisher().publish(1, Sender(), workers)
    assert report.updated == ("a",)
    assert "b does not compute with weight version 1" in report.failed["b"]


async def test_workers_are_connected_before_any_is_paused() -> None:
    class Connecting(Sender):
        async def connect(self, workers: Sequence[Any]) -> None:
            assert [worker.did for worker in workers] == [[], []]
            raise RuntimeError("no route to b")

    workers = [Worker("a"), Worker("b")]
    with pytest.raises(WeightsBroken, match=r"connecting a, b for weight version 1: .* no route to b"):
        await publisher().publish(1, Connecting(), workers)
    assert [worker.did for worker in workers] == [[], []]


async def test_a_cache_that_is_filled_by_the_first_look_is_looked_at_again() -> None:
    workers = [Worker("a"), Worker("b", [(-1.0, -2.0), (-1.0, -3.0)])]
    report = await publisher().publish(1, Sender(), workers)
    assert list(report.failed) == ["b"]


async def test_the_probe_runs_at_every_nth_version() -> None:
    worker = Worker("a")
    publishing = publisher(every=3)
    for version in range(1, 7):
        await publishing.publish(version, Sender(), [worker])
    assert worker.did.count("score") == 2 * 2


async def test_weights_that_cannot_be_sent_stop_the_run_and_resume_no_one() -> None:
    workers = [Worker("a"), Worker("b")]
    with pytest.raises(WeightsBroken, match="version 1 was not sent: RuntimeError: NCCL is down"):
        await publisher().publish(1, Sender(RuntimeError("NCCL is down")), workers)
    assert all(w.did == ["pause", "receive"] for w in workers)


async def test_a_publish_that_no_worker_took_is_an_error() -> None:
    worker = Worker("a")
    worker.broken["receive"] = RuntimeError("short read")
    with pytest.raises(WeightsBroken, match=r"no worker took weight version 1.*short read"):
        await publisher().publish(1, Sender(), [worker])


async def test_a_publish_without_workers_only_prepares() -> None:
    publishing = publisher()
    report = await publishing.publish(1, Sender(), [])
    assert report.updated == ()
    assert publishing.current is not None
    assert publishing.current.version == 1


async def test_an_older_version_is_refused_before_anyone_is_paused() -> None:
    worker, publishing = Worker("a"), publisher()
    await publishing.publish(2, Sender(), [worker])
    done = len(worker.did)
    with pytest.raises(ValueError, match="1 is not newer than 2"):
        await publishing.publish(1, Sender(), [worker])
    assert len(worker.did) == done


async def test_a_learner_that_is_late_is_named() -> None:
    class Late(Sender):
        async def prepare(self, version: int) -> Update:
            await asyncio.Event().wait()
            raise AssertionError

    with pytest.raises(Overdue, match="learner did not finish preparing weight version 1"):
        await publisher(deadline_s=0.05).publish(1, Late(), [Worker("a")])


class Pushing(Sender):
    """Pushes to a group, and waits for all of it."""

    def __init__(self, copies: bool = True) -> None:
        super().__init__()
        self.copies, self.connected, self.aborted = copies, list[str](), asyncio.Event()
        self.waits = False

    async def prepare(self, version: int) -> Update:
        return Update(version, "", {"names": []}, 8, (-1.0, -2.0))

    async def connect(self, workers: Sequence[Any]) -> None:
        self.connected = [worker.name for worker in workers]

    async def send(self, update: Update) -> None:
        if self.waits:
            await self.aborted.wait()
            raise RuntimeError("the group was aborted")

    async def abort(self) -> None:
        self.aborted.set()

    async def copy(self, update: Update) -> Update | None:
        return Update(update.version, "c", {"directory": "/there"}, 8, (-1.0, -2.0)) if self.copies else None


async def test_a_worker_that_may_vanish_pulls_a_copy_and_is_in_no_group() -> None:
    workers, sender = [Worker("a"), Worker("spot")], Pushing()
    workers[1].pulls = True
    report = await publisher().publish(1, sender, workers)
    assert report.updated == ("a", "spot")
    assert sender.connected == ["a"]
    assert [worker.got[0].pulled for worker in workers] == [False, True]


@pytest.mark.parametrize("copies", [True, False])
async def test_a_worker_that_joins_pulls_a_copy_or_where_none_is_kept_is_sent_it_alone(copies: bool) -> None:
    worker, sender, publishing = Worker("late"), Pushing(copies), publisher()
    update = await publishing.prepare(1, sender)
    report = await publishing.deliver(update, [worker], sender=sender, joining=True)
    assert report.updated == ("late",)
    assert worker.got[0].pulled is copies
    assert sender.connected == ([] if copies else ["late"])


async def test_a_member_that_dies_aborts_the_push_and_all_that_it_went_to_are_out() -> None:
    """Nobody waits for a broadcast that cannot end, and whoever has part of it does not play on."""
    workers, sender = [Worker("a"), Worker("b"), Worker("spot")], Pushing()
    workers[2].pulls, sender.waits = True, True
    workers[1].broken["receive"] = RuntimeError("died")
    report = await publisher(deadline_s=30.0).publish(1, sender, workers)
    assert sender.aborted.is_set()
    assert report.updated == ("spot",)
    assert report.failed == {
        "a": "weight version 1 was not sent: RuntimeError: the group was aborted",
        "b": "RuntimeError: died",
    }
