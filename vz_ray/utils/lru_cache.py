"""LRU cache with a limit on the total size of its values."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LruCache(Generic[K, V]):
    """Keeps the most recently used values. A value larger than the cache is not kept.

    Args:
        max_size: Maximum of the sum of sizes.
        size_of: Returns the size of a value, such as its bytes.

    Attributes:
        hits: Number of `get` calls that returned a value.
        misses: Number of `get` calls that returned None.
    """

    def __init__(self, max_size: int, size_of: Callable[[V], int]) -> None:
        self._max_size, self._size_of, self._size = max_size, size_of, 0
        self._entries: OrderedDict[K, V] = OrderedDict()
        self.hits = self.misses = 0

    def get(self, key: K) -> V | None:
        value = self._entries.get(key)
        if value is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return value

    def add(self, key: K, value: V) -> None:
        """Add a value unless the key exists; evict the least recently used ones if the cache is full."""
        size = self._size_of(value)
        if key in self._entries or size > self._max_size:
            return
        self._entries[key] = value
        self._size += size
        while self._size > self._max_size:
            self._size -= self._size_of(self._entries.popitem(last=False)[1])

    def clear(self) -> None:
        """Remove all entries; `hits` and `misses` are kept."""
        self._entries.clear()
        self._size = 0
