"""Scaling policy: delays, bounds and stability."""

from __future__ import annotations

import random

import pytest

from vz_ray.config.clips import ClipsConfig
from vz_ray.utils.scaling_policy import ScalingPolicy


def make_policy(min_count: int = 2, max_count: int = 6) -> ScalingPolicy:
    return ScalingPolicy(
        min_count=min_count, max_count=max_count, max_load_each=4, upscale_delay_s=5, downscale_delay_s=60
    )


def simulate(policy: ScalingPolicy, loads: list[int], count: int = 2) -> list[int]:
    """Return the count after each second."""
    counts = []
    for second, load in enumerate(loads):
        count = policy.target_count(float(second), count, load)
        counts.append(count)
    return counts


def test_sustained_overload_scales_up() -> None:
    assert simulate(make_policy(), [15] * 7) == [2, 2, 2, 2, 2, 4, 4]
    assert simulate(make_policy(), [1000] * 6)[-1] == 6


def test_short_burst_does_not_scale_up() -> None:
    assert set(simulate(make_policy(), ([100] * 4 + [0]) * 10)) == {2}


def test_idle_units_are_removed_one_by_one() -> None:
    counts = simulate(make_policy(), [0] * 400, count=6)
    assert (counts[59], counts[60], counts[119], counts[120]) == (6, 5, 5, 4)
    assert counts[-1] == 2


@pytest.mark.parametrize("requests", range(0, 30, 3))
def test_steady_load_converges(requests: int) -> None:
    counts = simulate(make_policy(), [requests] * 1000)
    assert len(set(counts[500:])) == 1


def test_random_load_stays_within_bounds() -> None:
    draw = random.Random(0)
    loads = [load for _ in range(60) for load in [draw.choice([0, 3, 40])] * draw.randint(1, 300)]
    counts = simulate(make_policy(), loads)
    assert set(counts) == {2, 3, 4, 5, 6}


def test_fixed_count_never_changes() -> None:
    assert set(simulate(make_policy(3, 3), [0] * 100 + [500] * 100 + [0] * 100, count=3)) == {3}


def test_scales_to_zero_and_back() -> None:
    counts = simulate(make_policy(min_count=0), [8] * 10 + [0] * 200 + [1] * 10)
    assert (counts[9], counts[209], counts[-1]) == (2, 0, 1)


def test_max_below_num_actors_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"max_actors is 1; it must be at least num_actors \(2\)"):
        ClipsConfig(num_actors=2, max_actors=1)
