"""How many decode actors there should be: grows with the queue, shrinks when idle, never swings."""

from __future__ import annotations

import random

import pytest

from vz_ray.clips.scaler import Scaler
from vz_ray.config.clips import ClipsConfig

CONFIG = ClipsConfig(actors=2, max_actors=6, queue=4, grow_s=5, shrink_s=60)


def run(scaler: Scaler, loads: list[int], actors: int = 2, start_s: float = 0.0) -> list[int]:
    """Actors after each second of such loads."""
    counts = []
    for second, requests in enumerate(loads):
        actors = scaler.target(start_s + second, actors, requests)
        counts.append(actors)
    return counts


def test_it_grows_to_what_the_queue_asks_for_once_it_has_lasted() -> None:
    assert run(Scaler(CONFIG), [15] * 7) == [2, 2, 2, 2, 2, 4, 4]
    assert run(Scaler(CONFIG), [1000] * 6)[-1] == 6


def test_a_short_burst_starts_nothing() -> None:
    assert set(run(Scaler(CONFIG), ([100] * 4 + [0]) * 10)) == {2}


def test_it_shrinks_one_by_one_and_never_below_the_fixed_ones() -> None:
    counts = run(Scaler(CONFIG), [0] * 400, actors=6)
    assert (counts[59], counts[60], counts[119], counts[120]) == (6, 5, 5, 4)
    assert counts[-1] == 2


@pytest.mark.parametrize("requests", range(0, 30, 3))
def test_a_steady_load_comes_to_rest(requests: int) -> None:
    counts = run(Scaler(CONFIG), [requests] * 1000)
    assert len(set(counts[500:])) == 1


def test_any_load_keeps_to_the_bounds() -> None:
    draw = random.Random(0)
    loads = [load for _ in range(60) for load in [draw.choice([0, 3, 40])] * draw.randint(1, 300)]
    counts = run(Scaler(CONFIG), loads)
    assert set(counts) == {2, 3, 4, 5, 6}


def test_a_fixed_number_stays() -> None:
    assert set(run(Scaler(ClipsConfig(actors=3)), [0] * 100 + [500] * 100 + [0] * 100, actors=3)) == {3}


def test_fewer_than_the_fixed_ones_are_refused() -> None:
    with pytest.raises(ValueError, match=r"clips\.max_actors is 1, below clips\.actors \(2\)"):
        ClipsConfig(actors=2, max_actors=1)
