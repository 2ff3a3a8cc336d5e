"""Cache of decoded frames: in memory, and on disk for all processes of the machine."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import asdict
from typing import NamedTuple

import blake3

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
    """LRU cache in memory on top of an optional disk cache. Frames larger than the memory are not kept there.

    Attributes:
        hits: Frames found in memory.
        disk_hits: Frames found on disk.
        misses: Frames found in neither.
    """

    def __init__(self, max_bytes: int, disk: DiskCache | None) -> None:
        self._max_bytes, self._disk = max_bytes, disk
        self._frames: OrderedDict[FrameKey, Frame] = OrderedDict()
        self._size_bytes = self.hits = self.disk_hits = self.misses = 0

    def get(self, key: FrameKey) -> Frame | None:
        frame = self._frames.get(key)
        if frame is not None:
            self.hits += 1
            self._frames.move_to_end(key)
            return frame
        stored = self._disk.get(_entry_name(key)) if self._disk is not None else None
        if stored is None:
            self.misses += 1
            return None
        self.disk_hits += 1
        end = _LENGTH_BYTES + int.from_bytes(stored[:_LENGTH_BYTES].tobytes(), "little")
        ref = FrameRef(**json.loads(stored[_LENGTH_BYTES:end].tobytes()))
        frame = Frame(ref, stored[end:].reshape(ref.height, ref.width, 3))
        self._keep(key, frame)
        return frame

    def put(self, key: FrameKey, frame: Frame) -> None:
        self._keep(key, frame)
        if self._disk is not None:
            ref = json.dumps(asdict(frame.ref)).encode()
            length = len(ref).to_bytes(_LENGTH_BYTES, "little")
            self._disk.put(_entry_name(key), length, ref, frame.rgb.reshape(-1).data)

    def _keep(self, key: FrameKey, frame: Frame) -> None:
        if key in self._frames or frame.rgb.nbytes > self._max_bytes:
            return
        self._frames[key] = frame
        self._size_bytes += frame.rgb.nbytes
        while self._size_bytes > self._max_bytes:
            _, evicted = self._frames.popitem(last=False)
            self._size_bytes -= evicted.rgb.nbytes


_VERSION, _LENGTH_BYTES = 2, 4
"""Layout of an entry: length of the reference (4 bytes, little-endian), reference as JSON, pixels."""


def _entry_name(key: FrameKey) -> str:
    return blake3.blake3(repr(("frame", _VERSION, *key)).encode()).hexdigest()
