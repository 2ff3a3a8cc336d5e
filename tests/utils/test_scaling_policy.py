"""It grows with the load, shrinks when idle, never swings, and can go to none and back."""

from __future__ import annotations

import random

import pytest

from vz_ray.config.clips import ClipsConfig
from vz_ray.utils.scaling_policy import ScalingPolicy


def scaler(least: int = 2, most: int = 6) -> ScalingPolicy:
    return ScalingPolicy(
        min_count=least, max_count=most, max_load_each=4, upscale_delay_s=5, downscale_delay_s=60
    )


def run(scaler: ScalingPolicy, loads: list[int], count: int = 2) -> list[int]:
    """How many there are after each second of such loads."""
    counts = []
    for second, load in enumerate(loads):
        count = scaler.target_count(float(second), count, load)
        counts.append(count)
    return counts


def test_it_grows_to_what_the_queue_asks_for_once_it_has_lasted() -> None:
    assert run(scaler(), [15] * 7) == [2, 2, 2, 2, 2, 4, 4]
    assert run(scaler(), [1000] * 6)[-1] == 6


def test_a_short_burst_starts_nothing() -> None:
    assert set(run(scaler(), ([100] * 4 + [0]) * 10)) == {2}


def test_it_shrinks_one_by_one_and_never_below_the_least() -> None:
    counts = run(scaler(), [0] * 400, count=6)
    assert (counts[59], counts[60], counts[119], counts[120]) == (6, 5, 5, 4)
    assert counts[-1] == 2


@pytest.mark.parametrize("requests", range(0, 30, 3))
def test_a_steady_load_comes_to_rest(requests: int) -> None:
    counts = run(scaler(), [requests] * 1000)
    assert len(set(counts[500:])) == 1


def test_any_load_keeps_to_the_bounds() -> None:
    draw = random.Random(0)
    loads = [load for _ in range(60) for load in [draw.choice([0, 3, 40])] * draw.randint(1, 300)]
    counts = run(scaler(), loads)
    assert set(counts) == {2, 3, 4, 5, 6}


def test_a_fixed_number_stays() -> None:
    assert set(run(scaler(3, 3), [0] * 100 + [500] * 100 + [0] * 100, count=3)) == {3}


def test_it_goes_to_none_and_back() -> None:
    counts = run(scaler(least=0), [8] * 10 + [0] * 200 + [1] * 10)
    assert (counts[9], counts[209], counts[-1]) == (2, 0, 1)


def test_fewer_than_the_fixed_ones_are_refused() -> None:
    with pytest.raises(ValueError, match=r"clips\.max_actors is 1, below clips\.actors \(2\)"):
        ClipsConfig(num_actors=2, max_actors=1)
