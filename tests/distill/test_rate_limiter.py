from __future__ import annotations

import random

import pytest

from vz_ray.distill.rate_limiter import WINDOW_S, RateLimiter


def test_unlimited_requests_never_wait():
    limiter = RateLimiter(requests_per_minute=0, tokens_per_minute=0)
    for _ in range(100):
        assert limiter.wait_time_s(0.0, 10**9) == 0.0
        limiter.record_request(0.0, 10**9)


def test_request_limit_waits_for_oldest_request():
    limiter = RateLimiter(requests_per_minute=2, tokens_per_minute=0)
    limiter.record_request(10.0, 1)
    limiter.record_request(15.0, 1)
    assert limiter.wait_time_s(20.0, 1) == pytest.approx(50.0)
    assert limiter.wait_time_s(70.0, 1) == 0.0


def test_token_limit_waits_for_enough_requests():
    limiter = RateLimiter(requests_per_minute=0, tokens_per_minute=100)
    for second in range(4):
        limiter.record_request(float(second), 25)
    assert limiter.wait_time_s(10.0, 25) == pytest.approx(50.0)
    assert limiter.wait_time_s(10.0, 75) == pytest.approx(52.0)


def test_oversized_request_is_sent_alone():
    limiter = RateLimiter(requests_per_minute=0, tokens_per_minute=100)
    assert limiter.wait_time_s(0.0, 500) == 0.0
    limiter.record_request(0.0, 500)
    assert limiter.wait_time_s(1.0, 1) == pytest.approx(59.0)


def test_corrected_token_count_shortens_wait():
    limiter = RateLimiter(requests_per_minute=0, tokens_per_minute=100)
    sent = limiter.record_request(0.0, 100)
    assert limiter.wait_time_s(1.0, 50) > 0
    sent.tokens = 20
    assert limiter.wait_time_s(1.0, 50) == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_no_window_exceeds_limits(seed):
    rng = random.Random(seed)
    requests, tokens = rng.randint(1, 9), rng.randint(100, 400)
    limiter, now, sent = RateLimiter(requests, tokens), 0.0, []
    for _ in range(120):
        now += rng.expovariate(0.5)
        size = rng.randint(1, 100)
        now += limiter.wait_time_s(now, size)
        assert limiter.wait_time_s(now, size) <= 1e-9
        limiter.record_request(now, size)
        sent.append((now, size))
    for start, _ in sent:
        window = [size for sent_s, size in sent if start <= sent_s < start + WINDOW_S - 1e-6]
        assert len(window) <= requests
        assert sum(window) <= tokens
