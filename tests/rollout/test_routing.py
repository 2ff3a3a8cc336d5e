"""Routing of groups to workers."""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.rollout.engine_stats import EngineStatLogger, EngineStats, WorkerCapacity
from vz_ray.rollout.routing import WorkerRouter


@dataclass(frozen=True)
class FakeCandidate:
    name: str
    load: int
    capacity: WorkerCapacity | None


def choose(*candidates: FakeCandidate, episode_tokens: int = 1000) -> str:
    router = WorkerRouter()
    if episode_tokens:
        router.record_episode(episode_tokens)
    return router.choose(candidates).name


def test_router_prefers_free_cache_over_few_episodes() -> None:
    long = FakeCandidate("few long episodes", 4, WorkerCapacity(2000, 4))
    short = FakeCandidate("many short episodes", 12, WorkerCapacity(9000, 12))
    assert choose(long, short) == "many short episodes"


def test_router_corrects_for_new_episodes() -> None:
    filled = FakeCandidate("filled later", 12, WorkerCapacity(9000, 4))
    steady = FakeCandidate("steady", 4, WorkerCapacity(2000, 4))
    assert choose(filled, steady) == "steady"
    assert choose(filled, steady, episode_tokens=100) == "filled later"


def test_router_uses_load_without_reports() -> None:
    silent = FakeCandidate("silent", 3, None)
    busy = FakeCandidate("busy", 5, WorkerCapacity(9000, 5))
    assert choose(silent, busy) == "silent"
    roomy = FakeCandidate("roomy", 5, WorkerCapacity(9000, 5))
    full = FakeCandidate("full", 4, WorkerCapacity(10, 4))
    assert choose(roomy, full, episode_tokens=0) == "full"


def test_router_breaks_ties_by_load_then_order() -> None:
    assert choose(FakeCandidate("a", 5, WorkerCapacity(900, 5)), FakeCandidate("b", 4, WorkerCapacity(900, 4))) == "b"
    assert choose(FakeCandidate("a", 4, WorkerCapacity(900, 4)), FakeCandidate("b", 4, WorkerCapacity(900, 4))) == "a"


def test_router_tracks_the_mean_episode_length() -> None:
    router = WorkerRouter()
    router.record_episode(100)
    for _ in range(200):
        router.record_episode(1000)
    assigned = FakeCandidate("four new episodes", 8, WorkerCapacity(5000, 4))
    full = FakeCandidate("full", 4, WorkerCapacity(1100, 4))
    # 5000 - 4 x 1000 is less than 1100; with the first episode's length it would be more.
    assert router.choose([assigned, full]).name == "full"


def test_stat_logger_accumulates_scheduler_stats() -> None:
    stat_logger = EngineStatLogger()

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

    assert stat_logger(Config(Cache()), 0) is stat_logger
    stat_logger.record(Scheduler(0.5, Prefix()), None, Frames(10, 2))
    stat_logger.record(Scheduler(0.25, Prefix()), None, Frames(6, 6))
    stat_logger.record(None, None)
    stats = stat_logger.merge_into(EngineStats(turns=3))
    assert stats == EngineStats(
        turns=3, frames=16, cached_frames=8, preempted_turns=2, kv_cache_tokens=1000, kv_cache_used_tokens=250
    )
