"""Caches of frames: decoded pixels per rank, and features of a frozen vision tower."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

from vz_ray.env.protocols import FrameSource
from vz_ray.learner.example import FrameKey, frame_key
from vz_ray.utils.timeouts import with_timeout
from vz_ray.video.frame import RGB, FrameRef

T = TypeVar("T")
PixelArray = TypeVar("PixelArray", RGB, Tensor)


class LruCache(Generic[PixelArray]):
    """LRU cache of arrays with a limit on their total size.

    Attributes:
        hits: Number of `get` calls that returned an array.
        misses: Number of `get` calls that returned None.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes, self._size_bytes = capacity_bytes, 0
        self._entries: OrderedDict[FrameKey, PixelArray] = OrderedDict()
        self.hits = self.misses = 0

    def get(self, key: FrameKey) -> PixelArray | None:
        """Return the array of a frame, or None."""
        array = self._entries.get(key)
        if array is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return array

    def add(self, key: FrameKey, array: PixelArray) -> None:
        """Add the array of a frame; evict the least recently used ones if the cache is full."""
        if key in self._entries:
            return
        self._entries[key] = array
        self._size_bytes += array.nbytes
        while self._size_bytes > self._capacity_bytes:
            self._size_bytes -= self._entries.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Remove all entries; `hits` and `misses` are kept."""
        self._entries.clear()
        self._size_bytes = 0


class FeatureCache(LruCache[Tensor]):
    """Cache in host memory for the vision features of frames, `[visual tokens, H]` each.

    Valid for a frozen tower only: features of a trained tower are stale after the next update.
    """

    def put(self, keys: Sequence[FrameKey], features: Sequence[Tensor]) -> None:
        """Add copies of the features of these frames."""
        for key, rows in zip(keys, features, strict=True):
            self.add(key, rows.detach().to("cpu", copy=True))


class CachedFrameLoader:
    """Loads pixels from a frame source, with an LRU cache for repeated passes over a batch.

    Args:
        source: Resolves frame references to frames.
        capacity_bytes: Maximum size of the cache.
        timeout_s: Timeout of one fetch.
    """

    def __init__(self, source: FrameSource, capacity_bytes: int, timeout_s: float) -> None:
        self._source, self._timeout_s = source, timeout_s
        self._cache = LruCache[RGB](capacity_bytes)
        self._runner = asyncio.Runner()

    def __call__(self, refs: Sequence[FrameRef]) -> Mapping[str, RGB]:
        """Return the pixels of `refs` by digest.

        Raises:
            StepTimeout: The source did not answer within the timeout.
            VideoError: The source could not decode a frame.
        """
        cached = {ref: self._cache.get(frame_key(ref)) for ref in refs}
        pixels = {ref.digest: rgb for ref, rgb in cached.items() if rgb is not None}
        if missing := [ref for ref, rgb in cached.items() if rgb is None]:
            for ref, rgb in zip(missing, self._runner.run(self._fetch(missing)), strict=True):
                pixels[ref.digest] = rgb
                self._cache.add(frame_key(ref), rgb)
        return pixels

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine that uses the frame source on the loader's event loop."""
        return self._runner.run(coroutine)

    async def _fetch(self, refs: list[FrameRef]) -> list[RGB]:
        operation = f"{len(refs)} frames for the learner"
        frames = await with_timeout(
            self._source.resolve(refs), self._timeout_s, target="frame source", operation=operation
        )
        return [frame.rgb for frame in frames]
