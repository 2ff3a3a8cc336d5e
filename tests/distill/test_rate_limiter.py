from __future__ import annotations

import random

import pytest

from vz_ray.distill.rate_limiter import WINDOW_S, RateLimiter


def test_without_limits_nothing_waits():
    pace = RateLimiter(requests_per_minute=0, tokens_per_minute=0)
    for _ in range(100):
        assert pace.wait_time_s(0.0, 10**9) == 0.0
        pace.record_request(0.0, 10**9)


def test_the_request_after_the_last_waits_until_the_first_is_a_minute_old():
    pace = RateLimiter(requests_per_minute=2, tokens_per_minute=0)
    pace.record_request(10.0, 1)
    pace.record_request(15.0, 1)
    assert pace.wait_time_s(20.0, 1) == pytest.approx(50.0)
    assert pace.wait_time_s(70.0, 1) == 0.0


def test_a_large_request_waits_for_as_many_small_ones_as_it_takes():
    pace = RateLimiter(requests_per_minute=0, tokens_per_minute=100)
    for second in range(4):
        pace.record_request(float(second), 25)
    assert pace.wait_time_s(10.0, 25) == pytest.approx(50.0)
    assert pace.wait_time_s(10.0, 75) == pytest.approx(52.0)


def test_a_request_above_the_limit_goes_out_alone():
    pace = RateLimiter(requests_per_minute=0, tokens_per_minute=100)
    assert pace.wait_time_s(0.0, 500) == 0.0
    pace.record_request(0.0, 500)
    assert pace.wait_time_s(1.0, 1) == pytest.approx(59.0)


def test_what_turned_out_smaller_lets_others_go_sooner():
    pace = RateLimiter(requests_per_minute=0, tokens_per_minute=100)
    sent = pace.record_request(0.0, 100)
    assert pace.wait_time_s(1.0, 50) > 0
    sent.tokens = 20
    assert pace.wait_time_s(1.0, 50) == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_no_minute_has_more_than_the_limits_whatever_comes(seed):
    rng = random.Random(seed)
    requests, tokens = rng.randint(1, 9), rng.randint(100, 400)
    pace, now, sent = RateLimiter(requests, tokens), 0.0, []
    for _ in range(120):
        now += rng.expovariate(0.5)
        size = rng.randint(1, 100)
        now += pace.wait_time_s(now, size)
        assert pace.wait_time_s(now, size) <= 1e-9
        pace.record_request(now, size)
        sent.append((now, size))
    for start, _ in sent:
        window = [size for at, size in sent if start <= at < start + WINDOW_S - 1e-6]
        assert len(window) <= requests
        assert sum(window) <= tokens
