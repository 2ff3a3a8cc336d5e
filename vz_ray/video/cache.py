"""Decoded frames kept in memory, up to so many bytes."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from vz_ray.video.frame import Frame


class FrameKey(NamedTuple):
    """What was asked for: content, stream, pts in ticks, delivered size."""

    video_id: str
    stream: int
    pts: int
    width: int
    height: int


class FrameCache:
    """The frames used last. Pixels alone are counted; a frame larger than the cache is not kept.

    Attributes:
        bytes: Held now.
        hits: Look-ups that found their frame.
        misses: Look-ups that did not.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._frames: OrderedDict[FrameKey, Frame] = OrderedDict()
        self.bytes = self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self._frames)

    def get(self, key: FrameKey) -> Frame | None:
        frame = self._frames.get(key)
        if frame is None:
            self.misses += 1
            return None
        self.hits += 1
        self._frames.move_to_end(key)
        return frame

    def put(self, key: FrameKey, frame: Frame) -> None:
        if key in self._frames or frame.rgb.nbytes > self._most:
            return
        self._frames[key] = frame
        self.bytes += frame.rgb.nbytes
        while self.bytes > self._most:
            _, dropped = self._frames.popitem(last=False)
            self.bytes -= dropped.rgb.nbytes
