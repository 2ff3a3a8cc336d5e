"""Video metadata, cached on disk because computing it reads the whole file."""

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

_VERSION = 3


@dataclass(frozen=True, slots=True)
class VideoMetadata:
    """Result of scanning a file.

    Attributes:
        rotation_quarter_turns: Counterclockwise rotation in units of 90 degrees, from the file.
        coded_pixels: Area of a coded frame, pixels.
    """

    info: VideoInfo
    table: FrameTable
    rotation_quarter_turns: int
    decoder: str
    coded_pixels: int


class VideoMetadataCache:
    """Metadata and content hashes on disk: a file is hashed and scanned once per machine."""

    def __init__(self, disk: DiskCache | None) -> None:
        self._disk = disk

    def get(self, uri: str, path: str | None = None) -> VideoMetadata | None:
        """Return the cached metadata of the file's content, or None."""
        if self._disk is None:
            return None
        id_name = _name("video_id", file_key(uri, path))
        stored_id = self._disk.get(id_name)
        video_id = compute_video_id(uri, path) if stored_id is None else stored_id.tobytes().decode()
        if stored_id is None:
            self._disk.put(id_name, video_id.encode())
        stored = self._disk.get(_name("metadata", video_id))
        if stored is None:
            return None
        metadata = _load(stored.tobytes())
        return replace(metadata, info=replace(metadata.info, uri=uri))

    def put(self, metadata: VideoMetadata) -> None:
        if self._disk is not None:
            self._disk.put(_name("metadata", metadata.info.video_id), _dump(metadata))


def _name(kind: str, key: str | FileKey) -> str:
    """Return the cache key; it contains the decoder versions."""
    versions = (_VERSION, av.__version__, av.library_versions.get("libavformat"))
    return blake3.blake3(repr((kind, key, versions)).encode()).hexdigest()


def _dump(metadata: VideoMetadata) -> bytes:
    table = metadata.table
    header = {
        "info": asdict(metadata.info),
        "rotation_quarter_turns": metadata.rotation_quarter_turns,
        "decoder": metadata.decoder,
        "coded_pixels": metadata.coded_pixels,
        "end": table.end_pts,
        "time_base": [table.time_base.numerator, table.time_base.denominator],
        "seekable": table.seekable,
    }
    file = io.BytesIO()
    np.savez(
        file,
        header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8),
        pts=table.pts,
        keyframe_pts=table.keyframe_pts,
        keyframe_dts=table.keyframe_dts,
    )
    return file.getvalue()


def _load(stored: bytes) -> VideoMetadata:
    with np.load(io.BytesIO(stored), allow_pickle=False) as arrays:
        header: dict[str, Any] = json.loads(arrays["header"].tobytes())
        table = FrameTable(
            pts=arrays["pts"],
            keyframe_pts=arrays["keyframe_pts"],
            keyframe_dts=arrays["keyframe_dts"],
            end_pts=header["end"],
            time_base=Fraction(*header["time_base"]),
            seekable=header["seekable"],
        )
    return VideoMetadata(
        VideoInfo(**header["info"]),
        table,
        header["rotation_quarter_turns"],
        header["decoder"],
        header["coded_pixels"],
    )
