"""Control logic of a publish, with fake engines and transports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import pytest

from vz_ray.utils.timeouts import StepTimeout
from vz_ray.weight_sync import (
    ParityCheck,
    ParityProbe,
    ProbeScore,
    WeightIntegrityError,
    WeightPublisher,
    WeightTransport,
    WeightUpdate,
)
from vz_ray.weight_sync.parity_probe import ProbeGap

PROBE = ParityProbe((1,), (1,), (), (2, 3))
SCORE = ProbeScore(1, (-1.0, -2.0))


class FakeReceiver:
    def __init__(self, name: str, scores: Sequence[Sequence[float]] = ((-1.0, -2.0),)) -> None:
        self.name = name
        self.pulls_weights, self.learner_rank = False, 0
        self.parts: list[Any] = []
        self.updates: list[WeightUpdate] = []
        self.steps: list[str] = []
        self.failures: dict[str, Any] = {}
        self.num_prompt_tokens = 1
        self._scores = [tuple(score) for score in scores]

    async def _run(self, step: str) -> None:
        self.steps.append(step)
        failure = self.failures.get(step)
        if isinstance(failure, Exception):
            raise failure
        if failure == "hang":
            await asyncio.Event().wait()

    async def pause(self) -> None:
        await self._run("pause")

    async def receive_weights(self, update: WeightUpdate) -> None:
        self.updates.append(update)
        await self._run("receive_weights")

    async def begin_update(self) -> None:
        await self._run("begin_update")

    async def receive_part(self, info: dict[str, Any]) -> None:
        self.parts.append(info)
        await self._run("receive_part")

    async def finish_update(self, version: int) -> None:
        await self._run("finish_update")

    async def resume_engine(self) -> None:
        await self._run("resume_engine")

    async def continue_probe(self, probe: ParityProbe) -> Sequence[int]:
        return (4, 5)

    async def score_probe(self, probe: ParityProbe) -> ProbeScore:
        await self._run("score_probe")
        return ProbeScore(self.num_prompt_tokens, self._scores.pop(0) if len(self._scores) > 1 else self._scores[0])

    async def resume(self) -> None:
        await self._run("resume")


class FakePullTransport(WeightTransport):
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.release_error: Exception | None = None
        self.released = 0

    async def prepare(self, version: int, probe: ParityProbe | None = None) -> WeightUpdate:
        return WeightUpdate(version, "c", {}, 8, SCORE if probe else None)

    async def send(self, update: WeightUpdate) -> None:
        if self.error:
            raise self.error

    async def release(self) -> None:
        self.released += 1
        if self.release_error:
            raise self.release_error

    async def copy(self, update: WeightUpdate) -> WeightUpdate | None:
        return None

    def start_copy(self, update: WeightUpdate) -> None:
        return None


def make_publisher(**options: Any) -> WeightPublisher:
    return WeightPublisher(**{"timeout_s": 5.0, "parity": ParityCheck(PROBE), **options})


async def test_publish_steps_run_in_order() -> None:
    workers = [FakeReceiver("a"), FakeReceiver("b")]
    report = await make_publisher().publish(1, FakePullTransport(), workers)
    assert [w.steps for w in workers] == [
        ["pause", "receive_weights", "resume_engine", "score_probe", "score_probe", "resume"]
    ] * 2
    assert report.updated == ("a", "b")
    assert report.failed == {}
    assert report.probe_gap == ProbeGap(0.0, 0.0)
    assert report.pause_s + report.receive_s + report.probe_s <= report.sync_s


@pytest.mark.parametrize("step", ["pause", "receive_weights", "resume_engine", "score_probe"])
@pytest.mark.parametrize("failure", [RuntimeError("bad tensor"), "hang"])
async def test_failed_engine_is_never_resumed(step: str, failure: Any) -> None:
    workers = [FakeReceiver("a"), FakeReceiver("b"), FakeReceiver("c")]
    workers[1].failures[step] = failure
    report = await make_publisher(timeout_s=0.05).publish(1, FakePullTransport(), workers)
    assert report.updated == ("a", "c")
    assert list(report.failed) == ["b"]
    assert ("bad tensor" if failure != "hang" else "b did not finish") in report.failed["b"]
    assert workers[1].steps[-1] == step
    assert workers[0].steps[-1] == workers[2].steps[-1] == "resume"


@pytest.mark.parametrize("score", [(-1.0, -2.1), (-1.0, float("nan")), (float("nan"), -2.0)])
async def test_parity_failure_excludes_the_engine(score: tuple[float, float]) -> None:
    workers = [FakeReceiver("a"), FakeReceiver("b", [score])]
    report = await make_publisher().publish(1, FakePullTransport(), workers)
    assert report.updated == ("a",)
    assert "b failed the parity probe of weight version 1" in report.failed["b"]


async def test_different_prompt_lengths_are_named() -> None:
    worker = FakeReceiver("a")
    worker.num_prompt_tokens = 202
    with pytest.raises(WeightIntegrityError, match="its prompt has 202 tokens and the learner's 1;"):
        await make_publisher().publish(1, FakePullTransport(), [worker])


async def test_connect_failure_pauses_no_engine() -> None:
    class FailingConnectTransport(FakePullTransport):
        async def connect(self, workers: Sequence[Any]) -> None:
            assert [worker.steps for worker in workers] == [[], []]
            raise RuntimeError("no route to b")

    workers = [FakeReceiver("a"), FakeReceiver("b")]
    with pytest.raises(WeightIntegrityError, match=r"connecting a, b for weight version 1: .* no route to b"):
        await make_publisher().publish(1, FailingConnectTransport(), workers)
    assert [worker.steps for worker in workers] == [[], []]


async def test_probe_runs_twice_to_check_caches() -> None:
    workers = [FakeReceiver("a"), FakeReceiver("b", [(-1.0, -2.0), (-1.0, -3.0)])]
    report = await make_publisher().publish(1, FakePullTransport(), workers)
    assert list(report.failed) == ["b"]


async def test_probe_runs_at_every_nth_version() -> None:
    worker = FakeReceiver("a")
    publisher = make_publisher(probe_every=3)
    for version in range(1, 7):
        await publisher.publish(version, FakePullTransport(), [worker])
    assert worker.steps.count("score_probe") == 2 * 3, "the first, the third and the sixth version"


async def test_first_scored_version_is_probed() -> None:
    class UnscoredTransport(FakePullTransport):
        async def prepare(self, version: int, probe: ParityProbe | None = None) -> WeightUpdate:
            return await super().prepare(version)

    worker, publisher = FakeReceiver("a"), make_publisher(probe_every=3)
    assert (await publisher.publish(1, UnscoredTransport(), [worker])).probe_gap is None
    assert (await publisher.publish(2, FakePullTransport(), [worker])).probe_gap is not None
    assert (await publisher.publish(4, FakePullTransport(), [worker])).probe_gap is None


async def test_late_worker_scores_the_probe_of_its_version() -> None:
    class SlowTransport(FakePullTransport):
        async def prepare(self, version: int, probe: ParityProbe | None = None) -> WeightUpdate:
            raise TimeoutError

    class RecordingReceiver(FakeReceiver):
        scored: ParityProbe | None = None

        async def score_probe(self, probe: ParityProbe) -> ProbeScore:
            self.scored = probe
            return await super().score_probe(probe)

    publisher, transport, worker = make_publisher(), FakePullTransport(), RecordingReceiver("a")
    update = await publisher.prepare(1, transport)
    with pytest.raises(TimeoutError):
        await publisher.prepare(2, SlowTransport(), [worker])
    await publisher.deliver(update, [worker], transport=transport, joining=True)
    assert worker.scored == PROBE


async def test_send_failure_resumes_no_engine() -> None:
    workers = [FakeReceiver("a"), FakeReceiver("b")]
    with pytest.raises(WeightIntegrityError, match="version 1 was not sent: RuntimeError: NCCL is down"):
        await make_publisher().publish(1, FakePullTransport(RuntimeError("NCCL is down")), workers)
    assert all(w.steps == ["pause", "receive_weights"] for w in workers)


async def test_publish_raises_if_every_engine_fails() -> None:
    worker = FakeReceiver("a")
    worker.failures["receive_weights"] = RuntimeError("short read")
    with pytest.raises(WeightIntegrityError, match=r"no worker accepted weight version 1.*short read"):
        await make_publisher().publish(1, FakePullTransport(), [worker])


async def test_publish_without_engines_only_prepares() -> None:
    publisher = make_publisher()
    report = await publisher.publish(1, FakePullTransport(), [])
    assert report.updated == ()
    assert publisher.current is not None
    assert publisher.current.version == 1


async def test_older_version_pauses_no_engine() -> None:
    worker, publisher = FakeReceiver("a"), make_publisher()
    await publisher.publish(2, FakePullTransport(), [worker])
    num_steps = len(worker.steps)
    with pytest.raises(ValueError, match="1 is not newer than 2"):
        await publisher.publish(1, FakePullTransport(), [worker])
    assert len(worker.steps) == num_steps


async def test_failed_preparation_uses_up_the_version() -> None:
    """The transport may have written the version before it failed."""
    publisher = make_publisher()

    class FailingTransport(FakePullTransport):
        async def prepare(self, version: int, probe: ParityProbe | None = None) -> WeightUpdate:
            raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        await publisher.publish(1, FailingTransport(), [])
    assert publisher.newest == 1
    assert publisher.current is None
    with pytest.raises(ValueError, match="1 is not newer than 1"):
        await publisher.publish(1, FakePullTransport(), [])
    assert (await publisher.publish(2, FakePullTransport(), [])).version == 2


async def test_prepare_timeout_names_the_learner() -> None:
    class HangingTransport(FakePullTransport):
        async def prepare(self, version: int, probe: ParityProbe | None = None) -> WeightUpdate:
            await asyncio.Event().wait()
            raise AssertionError

    with pytest.raises(StepTimeout, match="learner did not finish preparing weight version 1"):
        await make_publisher(timeout_s=0.05).publish(1, HangingTransport(), [FakeReceiver("a")])


class FakePushTransport(FakePullTransport):
    """Transport that broadcasts to connected engines."""

    def __init__(self, copies: bool = True) -> None:
        super().__init__()
        self.copies, self.connected, self.aborted = copies, list[str](), asyncio.Event()
        self.blocks = False

    async def prepare(self, version: int, probe: ParityProbe | None = None) -> WeightUpdate:
        return WeightUpdate(version, "", {"names": []}, 8, SCORE if probe else None)

    async def connect(self, workers: Sequence[Any]) -> None:
        self.connected = [worker.name for worker in workers]

    async def send(self, update: WeightUpdate) -> None:
        if self.blocks:
            await self.aborted.wait()
            raise RuntimeError("the broadcast was aborted")

    async def abort(self) -> None:
        self.aborted.set()

    async def copy(self, update: WeightUpdate) -> WeightUpdate | None:
        return WeightUpdate(update.version, "c", {"directory": "/there"}, 8, SCORE) if self.copies else None


async def test_preemptible_engine_pulls_a_copy() -> None:
    workers, transport = [FakeReceiver("a"), FakeReceiver("spot")], FakePushTransport()
    workers[1].pulls_weights = True
    report = await make_publisher().publish(1, transport, workers)
    assert report.updated == ("a", "spot")
    assert transport.connected == ["a"]
    assert [worker.updates[0].is_pull for worker in workers] == [False, True]


@pytest.mark.parametrize("copies", [True, False])
async def test_joining_engine_pulls_a_copy_or_is_sent_one(copies: bool) -> None:
    worker, transport, publisher = FakeReceiver("late"), FakePushTransport(copies), make_publisher()
    update = await publisher.prepare(1, transport)
    report = await publisher.deliver(update, [worker], transport=transport, joining=True)
    assert report.updated == ("late",)
    assert worker.updates[0].is_pull is copies
    assert transport.connected == ([] if copies else ["late"])


class HangingReceiver(FakeReceiver):
    """Receiver that waits for the rest of a broadcast."""

    async def receive_weights(self, update: WeightUpdate) -> None:
        await asyncio.Event().wait()


async def test_member_death_releases_hanging_members() -> None:
    """The other members fail at once; they do not wait for their timeout."""
    workers, transport = [HangingReceiver("a"), FakeReceiver("b"), FakeReceiver("spot")], FakePushTransport()
    workers[2].pulls_weights, transport.blocks = True, True
    workers[1].failures["receive_weights"] = RuntimeError("died")
    report = await asyncio.wait_for(make_publisher(timeout_s=300.0).publish(1, transport, workers), 60)
    assert report.updated == ("spot",)
    assert report.failed == {
        "a": "WeightIntegrityError: the broadcast was aborted because b failed",
        "b": "RuntimeError: died",
    }


async def test_member_timeout_aborts_the_broadcast() -> None:
    workers, transport = [HangingReceiver("a"), FakeReceiver("spot")], FakePushTransport()
    workers[1].pulls_weights, transport.blocks = True, True
    report = await make_publisher(timeout_s=0.2).publish(1, transport, workers)
    assert transport.aborted.is_set()
    assert report.updated == ("spot",)
    assert report.failed["a"].startswith("StepTimeout: a did not finish receiving weight version 1 within 0.2 s")


async def test_failed_abort_fails_the_members() -> None:
    class UnreachableLearner(FakePushTransport):
        async def abort(self) -> None:
            raise RuntimeError("the learner died")

    workers, transport = [FakeReceiver("a"), FakeReceiver("b"), FakeReceiver("spot")], UnreachableLearner()
    workers[2].pulls_weights = True
    workers[1].failures["receive_weights"] = RuntimeError("died")
    report = await make_publisher(timeout_s=30.0).publish(1, transport, workers)
    assert report.updated == ("spot",)
    assert report.failed["a"] == "weight version 1 was not sent: RuntimeError: the learner died"


async def test_member_death_aborts_the_broadcast() -> None:
    """A stuck broadcast is aborted, and engines with partial weights fail."""
    workers, transport = [FakeReceiver("a"), FakeReceiver("b"), FakeReceiver("spot")], FakePushTransport()
    workers[2].pulls_weights, transport.blocks = True, True
    workers[1].failures["receive_weights"] = RuntimeError("died")
    report = await make_publisher(timeout_s=30.0).publish(1, transport, workers)
    assert transport.aborted.is_set()
    assert report.updated == ("spot",)
    assert report.failed == {
        "a": "weight version 1 was not sent: RuntimeError: the broadcast was aborted",
        "b": "RuntimeError: died",
    }


class PartsTransport(FakePullTransport):
    """Sends two parts to each of two ranks."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.part_error, self.closed, self.calls = error, 0, 0
        self.receivers: list[frozenset[int]] = []

    async def prepare(self, version: int, probe: ParityProbe | None = None) -> WeightUpdate:
        return WeightUpdate(version, "", {}, 8, SCORE if probe else None, in_parts=True)

    async def parts(
        self, update: WeightUpdate, receivers: Callable[[], frozenset[int]]
    ) -> AsyncGenerator[Sequence[dict[str, Any]]]:
        try:
            self.receivers.append(receivers())
            yield [{"rank": 0, "part": 0}, {"rank": 1, "part": 0}]
            if self.part_error:
                raise self.part_error
            self.receivers.append(receivers())
            yield [{"rank": 0, "part": 1}, {"rank": 1, "part": 1}]
            self.receivers.append(receivers())
        finally:
            self.closed += 1

    async def copy(self, update: WeightUpdate) -> WeightUpdate | None:
        raise AssertionError("no engine reads a copy")


def engines_of_two_ranks() -> list[FakeReceiver]:
    engines = [FakeReceiver("a"), FakeReceiver("b")]
    engines[0].learner_rank = 1
    return engines


async def test_each_engine_receives_the_parts_of_its_rank() -> None:
    transport, engines = PartsTransport(), engines_of_two_ranks()
    engines[0].pulls_weights = True  # matters only for a broadcast
    report = await make_publisher().publish(1, transport, engines)
    assert report.updated == ("a", "b")
    for engine, rank in zip(engines, (1, 0), strict=True):
        assert engine.parts == [{"rank": rank, "part": part} for part in range(2)]
        transfer = ["begin_update", "receive_part", "receive_part", "finish_update"]
        assert engine.steps == ["pause", *transfer, "resume_engine", "score_probe", "score_probe", "resume"]
    assert (transport.closed, transport.released) == (1, 1)


@pytest.mark.parametrize("step", ["begin_update", "receive_part", "finish_update"])
async def test_engine_that_fails_a_part_does_not_affect_others(step: str) -> None:
    engines = engines_of_two_ranks()
    engines[0].failures[step] = RuntimeError("died")
    transport = PartsTransport()
    report = await make_publisher().publish(1, transport, engines)
    failed_at = {"begin_update": 0, "receive_part": 1, "finish_update": 3}[step]
    assert transport.receivers == [frozenset({0, 1}) if part < failed_at else frozenset({0}) for part in range(3)]
    assert report.updated == ("b",)
    assert report.failed == {"a": "RuntimeError: died"}
    assert "resume" not in engines[0].steps


async def test_lost_rank_resumes_no_engine() -> None:
    engines, transport = engines_of_two_ranks(), PartsTransport(RuntimeError("rank 1 died"))
    with pytest.raises(WeightIntegrityError, match="was not sent: RuntimeError: rank 1 died"):
        await make_publisher().publish(1, transport, engines)
    assert transport.closed == 1
    assert all("finish_update" not in engine.steps and "resume" not in engine.steps for engine in engines)


async def test_engines_wait_until_the_learner_has_freed_its_memory() -> None:
    engine, transport = FakeReceiver("a"), FakePullTransport()
    transport.release_error = RuntimeError("rank 0 died")
    with pytest.raises(WeightIntegrityError, match="freeing memory for the engines after weight version 1: Runtime"):
        await make_publisher().publish(1, transport, [engine])
    assert engine.steps == ["pause", "receive_weights"]
