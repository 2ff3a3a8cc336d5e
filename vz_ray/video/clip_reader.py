"""Clip reader for many videos, with open readers and decoded frames cached."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from vz_ray.video.disk_cache import DiskCache
from vz_ray.video.errors import FrameMismatchError, NotAVideoError
from vz_ray.video.frame import (
    Clip,
    ClipRequest,
    Frame,
    FrameRef,
    FrameSize,
    ImageRequest,
    VideoInfo,
    ZoomRequest,
)
from vz_ray.video.frame_cache import FrameCache, FrameKey
from vz_ray.video.image_reader import IMAGE_DECODER, is_image, read_image
from vz_ray.video.sampling import clip_pts
from vz_ray.video.video_file import LOCAL_FILES, FileKey, VideoLimits, VideoLocator, file_key
from vz_ray.video.video_metadata import VideoMetadataCache
from vz_ray.video.video_reader import VideoReader


def _load_torchcodec_reader() -> type[VideoReader]:
    from vz_ray.video import torchcodec_reader

    torchcodec_reader.import_torchcodec()
    return torchcodec_reader.TorchcodecReader


DECODER_BACKENDS: Mapping[str, Callable[[], type[VideoReader]]] = {
    "pyav": lambda: VideoReader,
    "torchcodec": _load_torchcodec_reader,
}
"""Reader classes by name, imported lazily."""


@dataclass(frozen=True, slots=True)
class ReaderStats:
    """Counters of a clip reader. Stats of several readers can be added.

    Attributes:
        requests: Calls of probe, clip and resolve.
        hits: Memory cache hits, frames.
        disk_hits: Disk cache hits, frames.
        misses: Frames in neither cache, which were decoded.
        decoded_frames: Frames output by decoders, including those before a requested one.
        seeks: Seeks and reopenings.
        scanned_videos: Videos scanned because their metadata was not cached.
    """

    requests: int = 0
    hits: int = 0
    disk_hits: int = 0
    misses: int = 0
    decoded_frames: int = 0
    seeks: int = 0
    scanned_videos: int = 0

    def __add__(self, other: ReaderStats) -> ReaderStats:
        return ReaderStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class ClipReader:
    """Reads overviews, zooms and referenced frames. Not thread-safe.

    Decoded frames are cached by content hash, pts and size, so overlapping clips and references
    are cache hits. The overview of an image file is the image, which is not cached. Every method
    raises `VideoError` if the video cannot be read.

    Args:
        cache_bytes: Maximum size of the frames in memory.
        max_open_videos: Each open video holds the buffers of its decoder.
        disk_cache: Optional cache of frames and metadata, shared by all processes of the machine.
        decoder: Key of `DECODER_BACKENDS`.
        num_threads: Threads that decode a request across several GOPs (`pyav` only).

    Raises:
        UserError: The decoder cannot be loaded.
    """

    def __init__(
        self,
        *,
        cache_bytes: int = 256 * 2**20,
        max_open_videos: int = 8,
        limits: VideoLimits | None = None,
        disk_cache: DiskCache | None = None,
        locator: VideoLocator = LOCAL_FILES,
        decoder: str = "pyav",
        num_threads: int = 1,
    ) -> None:
        self._cache, self._max_open_videos = FrameCache(cache_bytes, disk_cache), max_open_videos
        self._limits = limits or VideoLimits()
        self._locator = locator
        self._reader_type, self._num_threads = DECODER_BACKENDS[decoder](), num_threads
        self._metadata = VideoMetadataCache(disk_cache)
        self._open: OrderedDict[FileKey, VideoReader] = OrderedDict()
        self._requests = self._scanned_videos = 0
        self._closed_decoded_frames = self._closed_seeks = 0

    def probe(self, uri: str) -> VideoInfo:
        self._requests += 1
        return self._reader(uri).info

    def clip(self, uri: str, request: ClipRequest, size: FrameSize) -> Clip:
        self._requests += 1
        if isinstance(request, ImageRequest) or (is_image(uri) and not isinstance(request, ZoomRequest)):
            return Clip(request, (read_image(uri, size, self._limits, path=self._locator.locate(uri)),))
        reader = self._reader(uri)
        pts = clip_pts(request, reader.info, reader.table)
        frames = self._frames(reader, pts, *reader.target_size(size))
        return Clip(request, tuple(frames[frame_pts] for frame_pts in pts))

    def resolve(self, refs: Sequence[FrameRef]) -> list[Frame]:
        """Return the referenced frames, in the given order.

        Raises:
            FrameMismatchError: The file or its decoded pixels differ from the reference.
        """
        self._requests += 1
        frames: dict[FrameRef, Frame] = {}
        batches: dict[tuple[str, int, int], list[FrameRef]] = {}
        for ref in refs:
            if ref.decoder.startswith(f"{IMAGE_DECODER} "):
                size, path = (ref.width, ref.height), self._locator.locate(ref.uri)
                frames[ref] = read_image(ref.uri, size, self._limits, path=path)
            else:
                batches.setdefault((ref.uri, ref.width, ref.height), []).append(ref)
        for (uri, width, height), batch in batches.items():
            reader = self._reader(uri)
            pts = {ref: reader.table.pts_at(ref.pts_s) for ref in batch}
            decoded = self._frames(reader, list(pts.values()), width, height)
            frames |= {ref: decoded[frame_pts] for ref, frame_pts in pts.items()}
        return [_check_digest(frames[ref], ref) for ref in refs]

    def stats(self) -> ReaderStats:
        readers = self._open.values()
        return ReaderStats(
            requests=self._requests,
            hits=self._cache.memory.hits,
            disk_hits=self._cache.disk_hits,
            misses=self._cache.memory.misses - self._cache.disk_hits,
            decoded_frames=self._closed_decoded_frames + sum(reader.decoded_frames for reader in readers),
            seeks=self._closed_seeks + sum(reader.seeks for reader in readers),
            scanned_videos=self._scanned_videos,
        )

    def close(self) -> None:
        while self._open:
            self._close_least_recent()

    def _frames(self, reader: VideoReader, pts: list[int], width: int, height: int) -> dict[int, Frame]:
        """Return frames by pts, from the caches or the decoder."""
        info, producer = reader.info, f"{reader.scaler} {reader.decoder}"
        keys = {
            frame_pts: FrameKey(producer, info.video_id, info.stream, frame_pts, width, height) for frame_pts in pts
        }
        cached = {frame_pts: frame for frame_pts, key in keys.items() if (frame := self._cache.get(key)) is not None}
        for frame_pts, frame in cached.items():
            if frame.ref.uri != info.uri:  # decoded from a copy of the file, which may be deleted
                cached[frame_pts] = Frame(replace(frame.ref, uri=info.uri), frame.rgb)
        decoded = reader.decode_pts(keys.keys() - cached.keys(), width, height)
        for frame_pts, frame in decoded.items():
            self._cache.put(keys[frame_pts], frame)
        return cached | decoded

    def _reader(self, uri: str) -> VideoReader:
        """Return the open reader of the file, or open one. A modified file is opened again."""
        if is_image(uri):
            raise NotAVideoError(
                f"{uri}: an image, not a video; request an overview", "the file is an image, not a video"
            )
        path = self._locator.locate(uri)
        key = file_key(uri, path)
        reader = self._open.get(key)
        if reader is None:
            metadata = self._metadata.get(uri, path)
            reader = self._open[key] = self._reader_type(
                uri, path=path, limits=self._limits, metadata=metadata, num_threads=self._num_threads
            )
            if metadata is None:
                self._scanned_videos += 1
                self._metadata.put(reader.metadata)
            while len(self._open) > self._max_open_videos:
                self._close_least_recent()
        self._open.move_to_end(key)
        return reader

    def _close_least_recent(self) -> None:
        _, reader = self._open.popitem(last=False)
        self._closed_decoded_frames += reader.decoded_frames
        self._closed_seeks += reader.seeks
        reader.close()


def _check_digest(frame: Frame, ref: FrameRef) -> Frame:
    decoded = frame.ref
    if decoded.digest == ref.digest:
        return frame
    cause = "the file has changed" if decoded.video_id != ref.video_id else "it decodes to other pixels"
    raise FrameMismatchError(
        f"{ref.uri}: the frame at {ref.pts_s:.3f} s differs from its reference, {cause}: "
        f"digest {decoded.digest[:12]} by {decoded.decoder}, expected {ref.digest[:12]} by {ref.decoder}"
    )
