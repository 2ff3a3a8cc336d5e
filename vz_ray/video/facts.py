"""What must be known of a file before a frame of it can be named; kept on disk: it takes a whole scan."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

import av
import blake3
import numpy as np

from vz_ray.video.disk import DiskStore
from vz_ray.video.frame import VideoInfo
from vz_ray.video.source import FileKey, file_key, video_id
from vz_ray.video.table import FrameTable

_VERSION = 2


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """One file, scanned.

    Attributes:
        info: What it is.
        table: When each frame is shown.
        quarter_turns: Anticlockwise turns by 90 degrees that its rotation metadata asks for.
        decoder: What decodes it, with its version.
        pixels: Area of a frame as coded.
    """

    info: VideoInfo
    table: FrameTable
    quarter_turns: int
    decoder: str
    pixels: int


class FactsStore:
    """Facts and content identities on disk, so that a file is hashed and scanned once per machine.

    Args:
        disk: Where they are kept; None keeps nothing.
    """

    def __init__(self, disk: DiskStore | None) -> None:
        self._disk = disk

    def identity(self, uri: str, path: str | None = None) -> str:
        """`video_id` of the file, remembered by path, size, times and inode."""
        key = file_key(uri, path)
        if self._disk is None:
            return video_id(uri, path)
        name = _name("identity", key)
        known = self._disk.get(name)
        if known is not None:
            return known.tobytes().decode()
        found = video_id(uri, path)
        self._disk.put(name, found.encode())
        return found

    def get(self, uri: str, path: str | None = None) -> VideoFacts | None:
        """What is known of the file's content, under this path; None if nothing is."""
        if self._disk is None:
            return None
        stored = self._disk.get(_name("facts", self.identity(uri, path)))
        if stored is None:
            return None
        facts = _load(stored.tobytes())
        return replace(facts, info=replace(facts.info, uri=uri))

    def put(self, facts: VideoFacts) -> None:
        if self._disk is not None:
            self._disk.put(_name("facts", facts.info.video_id), _dump(facts))


def _name(kind: str, key: str | FileKey) -> str:
    """Facts of another version of the decoder are other facts."""
    versions = (_VERSION, av.__version__, av.library_versions.get("libavformat"))
    return blake3.blake3(repr((kind, key, versions)).encode()).hexdigest()


def _dump(facts: VideoFacts) -> bytes:
    table = facts.table
    about = {
        "info": asdict(facts.info),
        "quarter_turns": facts.quarter_turns,
        "decoder": facts.decoder,
        "pixels": facts.pixels,
        "end": table.end,
        "time_base": [table.time_base.numerator, table.time_base.denominator],
        "seekable": table.seekable,
    }
    file = io.BytesIO()
    np.savez(
        file,
        about=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8),
        pts=table.pts,
        key_pts=table.key_pts,
        key_dts=table.key_dts,
    )
    return file.getvalue()


def _load(stored: bytes) -> VideoFacts:
    with np.load(io.BytesIO(stored), allow_pickle=False) as arrays:
        about: dict[str, Any] = json.loads(arrays["about"].tobytes())
        table = FrameTable(
            pts=arrays["pts"],
            key_pts=arrays["key_pts"],
            key_dts=arrays["key_dts"],
            end=about["end"],
            time_base=Fraction(*about["time_base"]),
            seekable=about["seekable"],
        )
    return VideoFacts(
        VideoInfo(**about["info"]), table, about["quarter_turns"], about["decoder"], about["pixels"]
    )
