"""Pixels for one rank: what its micro-batches refer to, fetched once and kept for a while."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from vz_ray.env.protocols import FrameSource
from vz_ray.learner.example import frame_key
from vz_ray.utils.timeouts import with_timeout
from vz_ray.video.frame import RGB, FrameRef

T = TypeVar("T")


class CachedFrameLoader:
    """A rank's window on the frame source: fetches what it lacks, keeps the latest.

    Args:
        source: Whoever has the pixels.
        capacity: Most bytes kept between calls.
        deadline_s: How long one fetch may take.
    """

    def __init__(self, source: FrameSource, capacity_bytes: int, timeout_s: float) -> None:
        self._source, self._capacity, self._deadline_s = source, capacity_bytes, timeout_s
        self._kept: OrderedDict[tuple[str, int, int], RGB] = OrderedDict()
        self._size = 0
        self._runner = asyncio.Runner()

    def __call__(self, refs: Sequence[FrameRef]) -> Mapping[str, RGB]:
        """Arrays by digest; raises what the source raises."""
        missing = [ref for ref in refs if frame_key(ref) not in self._kept]
        fresh = self._runner.run(self._fetch(missing)) if missing else {}
        found = {}
        for ref in refs:
            if (key := frame_key(ref)) in self._kept:
                self._kept.move_to_end(key)
            found[ref.digest] = self._kept[key] if key in self._kept else fresh[key]
        self._keep(fresh)
        return found

    def run(self, reading: Coroutine[Any, Any, T]) -> T:
        """What comes of other work with the source, done here to its end."""
        return self._runner.run(reading)

    async def _fetch(self, refs: list[FrameRef]) -> dict[tuple[str, int, int], RGB]:
        what = f"{len(refs)} frames for the learner"
        frames = await with_timeout(
            self._source.resolve(refs), self._deadline_s, target="frame source", operation=what
        )
        return {frame_key(ref): frame.rgb for ref, frame in zip(refs, frames, strict=True)}

    def _keep(self, fresh: Mapping[tuple[str, int, int], RGB]) -> None:
        for key, rgb in fresh.items():
            self._kept[key] = rgb
            self._size += rgb.nbytes
        while self._size > self._capacity:
            _, dropped = self._kept.popitem(last=False)
            self._size -= dropped.nbytes
