"""Caches of decoded frames: in memory, and on disk for all processes of the machine."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import asdict
from typing import NamedTuple

import blake3

from vz_ray.video.disk_cache import DiskCache
from vz_ray.video.frame import Frame, FrameRef


class FrameKey(NamedTuple):
    """Content hash, stream, pts in ticks, and size of the array."""

    video_id: str
    stream: int
    pts: int
    width: int
    height: int


class FrameCache:
    """LRU cache in memory. A frame larger than the cache is not stored.

    Attributes:
        hits: Cache hits.
        misses: Cache misses.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._frames: OrderedDict[FrameKey, Frame] = OrderedDict()
        self._size_bytes = self.hits = self.misses = 0

    def get(self, key: FrameKey) -> Frame | None:
        frame = self._frames.get(key)
        if frame is None:
            self.misses += 1
            return None
        self.hits += 1
        self._frames.move_to_end(key)
        return frame

    def put(self, key: FrameKey, frame: Frame) -> None:
        if key in self._frames or frame.rgb.nbytes > self._max_bytes:
            return
        self._frames[key] = frame
        self._size_bytes += frame.rgb.nbytes
        while self._size_bytes > self._max_bytes:
            _, evicted = self._frames.popitem(last=False)
            self._size_bytes -= evicted.rgb.nbytes


class DiskFrameCache:
    """Cache on disk, shared by processes.

    Args:
        disk: The storage.
        producer: Scaler and decoder with versions; part of the cache key.
    """

    def __init__(self, disk: DiskCache, producer: str) -> None:
        self._disk, self._producer = disk, producer

    def get(self, key: FrameKey) -> Frame | None:
        stored = self._disk.get(self._name(key))
        if stored is None:
            return None
        end = _LENGTH_BYTES + int.from_bytes(stored[:_LENGTH_BYTES].tobytes(), "little")
        ref = FrameRef(**json.loads(stored[_LENGTH_BYTES:end].tobytes()))
        return Frame(ref, stored[end:].reshape(ref.height, ref.width, 3))

    def put(self, key: FrameKey, frame: Frame) -> None:
        ref = json.dumps(asdict(frame.ref)).encode()
        length = len(ref).to_bytes(_LENGTH_BYTES, "little")
        self._disk.put(self._name(key), length, ref, frame.rgb.reshape(-1).data)

    def _name(self, key: FrameKey) -> str:
        return blake3.blake3(repr(("frame", _VERSION, self._producer, *key)).encode()).hexdigest()


_VERSION, _LENGTH_BYTES = 2, 4
"""Layout of an entry: length of the reference (4 bytes, little-endian), reference as JSON, pixels."""
