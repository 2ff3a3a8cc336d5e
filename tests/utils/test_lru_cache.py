"""LRU cache with a limit on the size of its values."""

from __future__ import annotations

from vz_ray.utils.lru_cache import LruCache


def test_least_recently_used_values_are_evicted() -> None:
    cache = LruCache[int, bytes](36, len)
    for key in range(3):
        cache.add(key, bytes(12))
    assert cache.get(0) is not None
    cache.add(3, bytes(12))
    assert cache.get(1) is None
    assert cache.get(0) is not None
    cache.add(4, bytes(48))
    assert cache.get(4) is None  # larger than the cache
    assert cache.get(3) is not None
    assert (cache.hits, cache.misses) == (3, 2)


def test_size_of_evicted_values_is_released() -> None:
    cache = LruCache[int, bytes](36, len)
    for key in range(100):
        cache.add(key, bytes(12))
    assert [key for key in range(100) if cache.get(key) is not None] == [97, 98, 99]
    cache.clear()
    cache.add(0, bytes(36))
    assert cache.get(0) is not None
