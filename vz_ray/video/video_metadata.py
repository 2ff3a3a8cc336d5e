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

from vz_ray.video.disk_cache import DiskCache
from vz_ray.video.frame import VideoInfo
from vz_ray.video.frame_table import FrameTable
from vz_ray.video.video_file import FileKey, compute_video_id, file_key

_VERSION = 2


@dataclass(frozen=True, slots=True)
class VideoMetadata:
    """One file, scanned.

    Attributes:
        info: What it is.
        table: When each frame is shown.
        rotation_quarter_turns: Anticlockwise turns by 90 degrees that its rotation metadata asks for.
        decoder: What decodes it, with its version.
        coded_pixels: Area of a frame as coded.
    """

    info: VideoInfo
    table: FrameTable
    rotation_quarter_turns: int
    decoder: str
    coded_pixels: int


class VideoMetadataCache:
    """Facts and content identities on disk, so that a file is hashed and scanned once per machine.

    Args:
        disk: Where they are kept; None keeps nothing.
    """

    def __init__(self, disk: DiskCache | None) -> None:
        self._disk = disk

    def video_id(self, uri: str, path: str | None = None) -> str:
        """`video_id` of the file, remembered by path, size, times and inode."""
        key = file_key(uri, path)
        if self._disk is None:
            return compute_video_id(uri, path)
        name = _name("video_id", key)
        known = self._disk.get(name)
        if known is not None:
            return known.tobytes().decode()
        found = compute_video_id(uri, path)
        self._disk.put(name, found.encode())
        return found

    def get(self, uri: str, path: str | None = None) -> VideoMetadata | None:
        """What is known of the file's content, under this path; None if nothing is."""
        if self._disk is None:
            return None
        stored = self._disk.get(_name("facts", self.video_id(uri, path)))
        if stored is None:
            return None
        facts = _load(stored.tobytes())
        return replace(facts, info=replace(facts.info, uri=uri))

    def put(self, facts: VideoMetadata) -> None:
        if self._disk is not None:
            self._disk.put(_name("facts", facts.info.video_id), _dump(facts))


def _name(kind: str, key: str | FileKey) -> str:
    """Facts of another version of the decoder are other facts."""
    versions = (_VERSION, av.__version__, av.library_versions.get("libavformat"))
    return blake3.blake3(repr((kind, key, versions)).encode()).hexdigest()


def _dump(facts: VideoMetadata) -> bytes:
    table = facts.table
    about = {
        "info": asdict(facts.info),
        "quarter_turns": facts.rotation_quarter_turns,
        "decoder": facts.decoder,
        "pixels": facts.coded_pixels,
        "end": table.end_pts,
        "time_base": [table.time_base.numerator, table.time_base.denominator],
        "seekable": table.seekable,
    }
    file = io.BytesIO()
    np.savez(
        file,
        about=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8),
        pts=table.pts,
        key_pts=table.keyframe_pts,
        key_dts=table.keyframe_dts,
    )
    return file.getvalue()


def _load(stored: bytes) -> VideoMetadata:
    with np.load(io.BytesIO(stored), allow_pickle=False) as arrays:
        about: dict[str, Any] = json.loads(arrays["about"].tobytes())
        table = FrameTable(
            pts=arrays["pts"],
            keyframe_pts=arrays["key_pts"],
            keyframe_dts=arrays["key_dts"],
            end_pts=about["end"],
            time_base=Fraction(*about["time_base"]),
            seekable=about["seekable"],
        )
    return VideoMetadata(
        VideoInfo(**about["info"]), table, about["quarter_turns"], about["decoder"], about["pixels"]
    )
