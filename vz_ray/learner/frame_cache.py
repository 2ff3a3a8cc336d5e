"""Caches of frames: decoded pixels per rank, and features of a frozen vision tower."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from vz_ray.env.protocols import FrameSource
from vz_ray.learner.example import FrameKey, frame_key
from vz_ray.utils.lru_cache import LruCache
from vz_ray.utils.timeouts import with_timeout
from vz_ray.video.frame import RGB, FrameRef

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class FrameFeatures:
    """Vision features of one frame.

    Attributes:
        num_tokens: Number of visual tokens.
        rows: `[num_tokens, levels * H]` in host memory; None until a forward pass has computed them.
    """

    num_tokens: int
    rows: Tensor | None = None

    def set(self, rows: Tensor) -> None:
        """Store a copy of the features."""
        self.rows = rows.detach().to("cpu", copy=True)


class FeatureCache(LruCache[FrameKey, FrameFeatures]):
    """Cache in host memory for the vision features of frames.

    An entry is reserved when a micro-batch is built and filled when it is computed. The content therefore
    depends on the order of micro-batches only, not on how far ahead they are built.

    Valid for a frozen tower only: features of a trained tower are stale after the next update.

    Args:
        capacity_bytes: Maximum size.
        token_bytes: Size of the features of one visual token.
    """

    def __init__(self, capacity_bytes: int, token_bytes: int) -> None:
        super().__init__(capacity_bytes, lambda features: features.num_tokens * token_bytes)

    def reserve(self, key: FrameKey, num_tokens: int) -> FrameFeatures:
        """Add an entry without features for a frame and return it."""
        features = FrameFeatures(num_tokens)
        self.add(key, features)
        return features


class CachedFrameLoader:
    """Loads pixels from a frame source, with an LRU cache for repeated passes over a batch.

    Any thread may call it, but one at a time.

    Args:
        source: Resolves frame references to frames.
        capacity_bytes: Maximum size of the cache.
        timeout_s: Timeout of one fetch.
    """

    def __init__(self, source: FrameSource, capacity_bytes: int, timeout_s: float) -> None:
        self._source, self._timeout_s = source, timeout_s
        self._cache = LruCache[FrameKey, RGB](capacity_bytes, lambda rgb: rgb.nbytes)
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

    def take_metrics(self) -> dict[str, float]:
        """Return `frame_cache_hit_rate` since the last call; nothing if no frame was requested."""
        hits, requests = self._cache.hits, self._cache.hits + self._cache.misses
        self._cache.hits = self._cache.misses = 0
        return {"frame_cache_hit_rate": hits / requests} if requests else {}

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine that uses the frame source on the loader's event loop."""
        return self._runner.run(coroutine)

    async def _fetch(self, refs: list[FrameRef]) -> list[RGB]:
        operation = f"{len(refs)} frames for the learner"
        frames = await with_timeout(
            self._source.resolve(refs), self._timeout_s, target="frame source", operation=operation
        )
        return [frame.rgb for frame in frames]
