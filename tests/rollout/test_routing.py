"""Where the next group goes."""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.rollout.engine_stats import EngineStatLogger, EngineStats, WorkerCapacity
from vz_ray.rollout.routing import WorkerRouter


@dataclass(frozen=True)
class FakeCandidate:
    name: str
    load: int
    capacity: WorkerCapacity | None


def chosen(*candidates: FakeCandidate, episode_tokens: int = 1000) -> str:
    admission = WorkerRouter()
    if episode_tokens:
        admission.record_episode(episode_tokens)
    return admission.choose(candidates).name


def test_router_prefers_free_cache_over_few_episodes() -> None:
    long = FakeCandidate("few long ones", 4, WorkerCapacity(2000, 4))
    short = FakeCandidate("many short ones", 12, WorkerCapacity(9000, 12))
    assert chosen(long, short) == "many short ones"


def test_router_corrects_for_new_episodes() -> None:
    filled = FakeCandidate("filled since", 12, WorkerCapacity(9000, 4))
    steady = FakeCandidate("steady", 4, WorkerCapacity(2000, 4))
    assert chosen(filled, steady) == "steady"
    assert chosen(filled, steady, episode_tokens=100) == "filled since"


def test_router_uses_load_without_reports() -> None:
    silent = FakeCandidate("silent", 3, None)
    busy = FakeCandidate("busy", 5, WorkerCapacity(9000, 5))
    assert chosen(silent, busy) == "silent"
    roomy = FakeCandidate("roomy", 5, WorkerCapacity(9000, 5))
    full = FakeCandidate("full", 4, WorkerCapacity(10, 4))
    assert chosen(roomy, full, episode_tokens=0) == "full"


def test_router_breaks_ties_by_load_then_order() -> None:
    assert (
        chosen(FakeCandidate("a", 5, WorkerCapacity(900, 5)), FakeCandidate("b", 4, WorkerCapacity(900, 4)))
        == "b"
    )
    assert (
        chosen(FakeCandidate("a", 4, WorkerCapacity(900, 4)), FakeCandidate("b", 4, WorkerCapacity(900, 4)))
        == "a"
    )


def test_router_tracks_the_mean_episode_length() -> None:
    admission = WorkerRouter()
    admission.record_episode(100)
    for _ in range(200):
        admission.record_episode(1000)
    given = FakeCandidate("given four", 8, WorkerCapacity(5000, 4))
    full = FakeCandidate("full", 4, WorkerCapacity(1100, 4))
    # 5000 - 4 x 1000 is less than 1100; with the first episode's length it would be more.
    assert admission.choose([given, full]).name == "full"


def test_stat_logger_accumulates_scheduler_stats() -> None:
    gauge = EngineStatLogger()

    @dataclass
    class Cache:
        kv_cache_size_tokens: int = 1000

    @dataclass
    class Config:
        cache_config: Cache

    @dataclass
    class Prefix:
        preempted_requests: int = 1

    @dataclass
    class Scheduler:
        kv_cache_usage: float
        prefix_cache_stats: Prefix

    @dataclass
    class Frames:
        queries: int
        hits: int

    assert gauge(Config(Cache()), 0) is gauge
    gauge.record(Scheduler(0.5, Prefix()), None, Frames(10, 2))
    gauge.record(Scheduler(0.25, Prefix()), None, Frames(6, 6))
    gauge.record(None, None)
    found = gauge.merge_into(EngineStats(turns=3))
    assert found == EngineStats(
        turns=3, frames=16, cached_frames=8, preempted_turns=2, kv_cache_tokens=1000, kv_cache_used_tokens=250
    )
