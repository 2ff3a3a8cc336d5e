"""Where the next group goes."""

from __future__ import annotations

from dataclasses import dataclass

from vz_ray.rollout.admission import Admission
from vz_ray.rollout.engine_stats import EngineGauge, EngineStats, Room


@dataclass(frozen=True)
class Candidate:
    name: str
    load: int
    room: Room | None


def chosen(*candidates: Candidate, episode_tokens: int = 1000) -> str:
    admission = Admission()
    if episode_tokens:
        admission.ended(episode_tokens)
    return admission.choose(candidates).name


def test_the_most_free_cache_wins_whoever_has_fewer_episodes() -> None:
    long = Candidate("few long ones", 4, Room(2000, 4))
    short = Candidate("many short ones", 12, Room(9000, 12))
    assert chosen(long, short) == "many short ones"


def test_what_was_given_since_the_last_word_counts_as_long_as_others() -> None:
    filled = Candidate("filled since", 12, Room(9000, 4))
    steady = Candidate("steady", 4, Room(2000, 4))
    assert chosen(filled, steady) == "steady"
    assert chosen(filled, steady, episode_tokens=100) == "filled since"


def test_before_anything_is_known_the_fewest_episodes_win() -> None:
    silent = Candidate("silent", 3, None)
    busy = Candidate("busy", 5, Room(9000, 5))
    assert chosen(silent, busy) == "silent"
    roomy = Candidate("roomy", 5, Room(9000, 5))
    full = Candidate("full", 4, Room(10, 4))
    assert chosen(roomy, full, episode_tokens=0) == "full"


def test_of_equal_room_the_less_busy_and_then_the_first() -> None:
    assert chosen(Candidate("a", 5, Room(900, 5)), Candidate("b", 4, Room(900, 4))) == "b"
    assert chosen(Candidate("a", 4, Room(900, 4)), Candidate("b", 4, Room(900, 4))) == "a"


def test_the_running_mean_follows_the_episodes() -> None:
    admission = Admission()
    admission.ended(100)
    for _ in range(200):
        admission.ended(1000)
    given = Candidate("given four", 8, Room(5000, 4))
    full = Candidate("full", 4, Room(1100, 4))
    # 5000 - 4 x 1000 is less than 1100; with the first episode's length it would be more.
    assert admission.choose([given, full]).name == "full"


def test_the_gauge_adds_up_what_the_engine_tells_it() -> None:
    gauge = EngineGauge()

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
    found = gauge.onto(EngineStats(turns=3))
    assert found == EngineStats(turns=3, frames=16, cached_frames=8, preempted=2, kv_tokens=1000, kv_used=250)
