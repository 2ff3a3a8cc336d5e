"""Caches of frames: decoded pixels per rank, and features of a frozen vision tower."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from vz_ray.env.protocols import FrameSource
from vz_ray.learner.example import FrameKey, frame_key
from vz_ray.utils.timeouts import with_timeout
from vz_ray.video.frame import RGB, FrameRef

T = TypeVar("T")


class CachedFrameLoader:
    """Loads pixels from a frame source, with an LRU cache for repeated passes over a batch.

    Args:
        source: Resolves frame references to frames.
        capacity_bytes: Maximum size of the cache between calls.
        timeout_s: Timeout of one fetch.
    """

    def __init__(self, source: FrameSource, capacity_bytes: int, timeout_s: float) -> None:
        self._source, self._capacity_bytes, self._timeout_s = source, capacity_bytes, timeout_s
        self._cache: OrderedDict[FrameKey, RGB] = OrderedDict()
        self._size_bytes = 0
        self._runner = asyncio.Runner()

    def __call__(self, refs: Sequence[FrameRef]) -> Mapping[str, RGB]:
        """Return the pixels of `refs` by digest.

        Raises:
            StepTimeout: The source did not answer within the timeout.
            VideoError: The source could not decode a frame.
        """
        missing = [ref for ref in refs if frame_key(ref) not in self._cache]
        fetched = self._runner.run(self._fetch(missing)) if missing else {}
        pixels = {}
        for ref in refs:
            if (key := frame_key(ref)) in self._cache:
                self._cache.move_to_end(key)
            pixels[ref.digest] = self._cache[key] if key in self._cache else fetched[key]
        self._add(fetched)
        return pixels

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine that uses the frame source on the loader's event loop."""
        return self._runner.run(coroutine)

    async def _fetch(self, refs: list[FrameRef]) -> dict[FrameKey, RGB]:
        operation = f"{len(refs)} frames for the learner"
        frames = await with_timeout(
            self._source.resolve(refs), self._timeout_s, target="frame source", operation=operation
        )
        return {frame_key(ref): frame.rgb for ref, frame in zip(refs, frames, strict=True)}

    def _add(self, fetched: Mapping[FrameKey, RGB]) -> None:
        for key, rgb in fetched.items():
            self._cache[key] = rgb
            self._size_bytes += rgb.nbytes
        while self._size_bytes > self._capacity_bytes:
            _, evicted = self._cache.popitem(last=False)
            self._size_bytes -= evicted.nbytes


class FeatureCache:
    """LRU cache in host memory for the vision features of frames.

    Valid for a frozen tower only: features of a trained tower are stale after the next update.

    Args:
        capacity_bytes: Maximum cache size.

    Attributes:
        hits: Number of `get` calls that returned features.
        misses: Number of `get` calls that returned None.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes, self._size_bytes = capacity_bytes, 0
        self._cache: OrderedDict[FrameKey, Tensor] = OrderedDict()
        self.hits, self.misses = 0, 0

    def get(self, key: FrameKey) -> Tensor | None:
        """Return the features `[visual tokens, H]` of a frame, or None."""
        features = self._cache.get(key)
        if features is None:
            self.misses += 1
            return None
        self.hits += 1
        self._cache.move_to_end(key)
        return features

    def put(self, keys: Sequence[FrameKey], features: Sequence[Tensor]) -> None:
        """Add the features of these frames; evict the least recently used ones if the cache is full."""
        for key, rows in zip(keys, features, strict=True):
            if key in self._cache:
                continue
            rows = rows.detach().to("cpu", copy=True)
            self._cache[key] = rows
            self._size_bytes += rows.nbytes
        while self._size_bytes > self._capacity_bytes:
            self._size_bytes -= self._cache.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Remove all entries; `hits` and `misses` are kept."""
        self._cache.clear()
        self._size_bytes = 0
