"""Cache of decoded frames: in memory, and on disk for all processes of the machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import NamedTuple

import blake3

from vz_ray.utils.lru_cache import LruCache
from vz_ray.video.disk_cache import DiskCache
from vz_ray.video.frame import Frame, FrameRef


class FrameKey(NamedTuple):
    """Scaler and decoder with versions, content hash, stream, pts in ticks, and size of the array."""

    producer: str
    video_id: str
    stream: int
    pts: int
    width: int
    height: int


class FrameCache:
    """LRU cache in memory on top of an optional disk cache.

    Attributes:
        memory: Decoded frames in memory.
        disk_hits: Frames found on disk.
    """

    def __init__(self, max_bytes: int, disk: DiskCache | None) -> None:
        self.memory = LruCache[FrameKey, Frame](max_bytes, lambda frame: frame.rgb.nbytes)
        self._disk, self.disk_hits = disk, 0

    def get(self, key: FrameKey) -> Frame | None:
        if (frame := self.memory.get(key)) is not None:
            return frame
        stored = self._disk.get(_entry_name(key)) if self._disk is not None else None
        if stored is None:
            return None
        self.disk_hits += 1
        end = _LENGTH_BYTES + int.from_bytes(stored[:_LENGTH_BYTES].tobytes(), "little")
        ref = FrameRef(**json.loads(stored[_LENGTH_BYTES:end].tobytes()))
        frame = Frame(ref, stored[end:].reshape(ref.height, ref.width, 3))
        self.memory.add(key, frame)
        return frame

    def put(self, key: FrameKey, frame: Frame) -> None:
        self.memory.add(key, frame)
        if self._disk is not None:
            ref = json.dumps(asdict(frame.ref)).encode()
            length = len(ref).to_bytes(_LENGTH_BYTES, "little")
            self._disk.put(_entry_name(key), length, ref, frame.rgb.reshape(-1).data)


_VERSION, _LENGTH_BYTES = 2, 4
"""Layout of an entry: length of the reference (4 bytes, little-endian), reference as JSON, pixels."""


def _entry_name(key: FrameKey) -> str:
    return blake3.blake3(repr(("frame", _VERSION, *key)).encode()).hexdigest()
