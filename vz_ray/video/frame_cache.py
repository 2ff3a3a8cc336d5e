"""Decoded frames kept for the next request: in memory, and on disk for every process of the machine."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import asdict
from typing import NamedTuple

import blake3

from vz_ray.video.disk_cache import DiskCache
from vz_ray.video.frame import Frame, FrameRef


class FrameKey(NamedTuple):
    """What was asked for: content, stream, pts in ticks, delivered size."""

    video_id: str
    stream: int
    pts: int
    width: int
    height: int


class FrameCache:
    """The frames used last, in memory. Pixels alone are counted; a frame larger than the cache is not kept.

    Attributes:
        size_bytes: Held now.
        hits: Look-ups that found their frame.
        misses: Look-ups that did not.
    """

    def __init__(self, max_bytes: int) -> None:
        self._most = max_bytes
        self._frames: OrderedDict[FrameKey, Frame] = OrderedDict()
        self.size_bytes = self.hits = self.misses = 0

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
        self.size_bytes += frame.rgb.nbytes
        while self.size_bytes > self._most:
            _, dropped = self._frames.popitem(last=False)
            self.size_bytes -= dropped.rgb.nbytes


class DiskFrameCache:
    """Decoded frames on disk, shared by processes.

    Args:
        disk: Where they are kept.
        made_by: Scaler and decoder with their versions: frames of others are not found.
    """

    def __init__(self, disk: DiskCache, made_by: str) -> None:
        self._disk, self._made_by = disk, made_by

    def get(self, key: FrameKey) -> Frame | None:
        stored = self._disk.get(self._name(key))
        if stored is None:
            return None
        end = _LENGTH + int.from_bytes(stored[:_LENGTH].tobytes(), "little")
        ref = FrameRef(**json.loads(stored[_LENGTH:end].tobytes()))
        return Frame(ref, stored[end:].reshape(ref.height, ref.width, 3))

    def put(self, key: FrameKey, frame: Frame) -> None:
        ref = json.dumps(asdict(frame.ref)).encode()
        length = len(ref).to_bytes(_LENGTH, "little")
        self._disk.put(self._name(key), length, ref, frame.rgb.reshape(-1).data)

    def _name(self, key: FrameKey) -> str:
        return blake3.blake3(repr(("frame", _VERSION, self._made_by, *key)).encode()).hexdigest()


_VERSION, _LENGTH = 2, 4
"""Of the layout of an entry: length of the reference (4 bytes, little-endian), reference as JSON, pixels."""
