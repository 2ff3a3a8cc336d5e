"""Clips of many videos: open readers and decoded frames are kept for the next request."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from vz_ray.video.disk_cache import DiskCache
from vz_ray.video.errors import FrameMismatchError, NotAVideoError
from vz_ray.video.frame import (
    Clip,
    Frame,
    FrameRef,
    FrameSize,
    ImageRequest,
    OverviewRequest,
    SelectedFramesRequest,
    VideoInfo,
    ZoomRequest,
)
from vz_ray.video.frame_cache import DiskFrameCache, FrameCache, FrameKey
from vz_ray.video.image_reader import IMAGE_DECODER as IMAGE
from vz_ray.video.image_reader import is_image, read_image, reread_image
from vz_ray.video.overview import overview_pts
from vz_ray.video.sampling import zoom_times
from vz_ray.video.video_file import LOCAL_FILES, FileKey, VideoLimits, VideoLocator, file_key
from vz_ray.video.video_metadata import VideoMetadataCache
from vz_ray.video.video_reader import VideoReader


def _torchcodec() -> type[VideoReader]:
    from vz_ray.video import torchcodec_reader

    torchcodec_reader.import_torchcodec()
    return torchcodec_reader.TorchcodecReader


DECODER_BACKENDS: Mapping[str, Callable[[], type[VideoReader]]] = {
    "pyav": lambda: VideoReader,
    "torchcodec": _torchcodec,
}
"""Kinds of reader by name, loaded when they are asked for."""


@dataclass(frozen=True, slots=True)
class ReaderStats:
    """What a clip reader has done; sums over several readers are meaningful.

    Attributes:
        requests: Calls of probe, overview, zoom and resolve.
        hits: Frames found in memory.
        disk_hits: Frames found on disk.
        misses: Frames found in neither, which had to be decoded.
        decoded_frames: Frames the decoders put out, those on the way to a wanted one included.
        seeks: Seeks and reopenings.
        scanned_videos: Videos of which nothing was known, so that every packet was looked at.
        cached_frames: In the cache now.
        cached_bytes: In the cache now.
        open_videos: Open now.
    """

    requests: int = 0
    hits: int = 0
    disk_hits: int = 0
    misses: int = 0
    decoded_frames: int = 0
    seeks: int = 0
    scanned_videos: int = 0
    cached_frames: int = 0
    cached_bytes: int = 0
    open_videos: int = 0

    def __add__(self, other: ReaderStats) -> ReaderStats:
        return ReaderStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class ClipReader:
    """Overviews, zooms and referenced frames, one at a time. Not thread-safe.

    Every decoded frame is cached by content, pts and size, so a clip that
    overlaps an earlier one, and a frame asked for again by reference, cost a
    look-up. The overview of an image file is that image, which is read each time;
    what it is called does not matter where a `ImageRequest` is asked for.
    Every method raises `VideoError` if the video cannot be read as asked.

    Args:
        cache_bytes: Most bytes of decoded frames to keep in memory.
        videos: Most videos to keep open; each holds its decoder's buffers.
        limits: What is refused.
        disk: Where decoded frames, and what scans found, are kept for every process of the machine;
            None keeps them in memory only.
        sources: Where the files are.
        decoder: What decodes, one of `DECODER_BACKENDS`.
        threads: Parts in which `pyav` decodes a request that spans several GOPs.

    Raises:
        UserError: The decoder cannot be loaded here.
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
        if max_open_videos < 1:
            raise ValueError(f"at least one video must stay open, got videos={max_open_videos}")
        self._cache, self._videos = FrameCache(cache_bytes), max_open_videos
        self._limits = limits or VideoLimits()
        self._sources = locator
        self._reader_type, self._threads = DECODER_BACKENDS[decoder](), num_threads
        self._disk, self._facts = disk_cache, VideoMetadataCache(disk_cache)
        self._open: OrderedDict[FileKey, VideoReader] = OrderedDict()
        self._requests = self._scanned = self._decoded = self._seeks = self._disk_hits = 0

    def probe(self, uri: str) -> VideoInfo:
        self._requests += 1
        return self._reader(uri).info

    def overview(
        self, uri: str, request: OverviewRequest | SelectedFramesRequest | ImageRequest, size: FrameSize
    ) -> Clip:
        self._requests += 1
        if isinstance(request, ImageRequest) or is_image(uri):
            return Clip(request, (read_image(uri, size, self._limits, path=self._sources.locate(uri)),))
        reader = self._reader(uri)
        return self._clip(reader, request, overview_pts(request, reader.info, reader.table), size)

    def zoom(self, uri: str, request: ZoomRequest, size: FrameSize) -> Clip:
        self._requests += 1
        reader = self._reader(uri)
        pts = [reader.table.pts_at(second) for second in zoom_times(request, reader.info)]
        return self._clip(reader, request, pts, size)

    def resolve(self, refs: Sequence[FrameRef]) -> list[Frame]:
        """The referenced frames, in the order asked.

        Raises:
            FrameMismatch: The file, or the pixels decoded from it, are not those of the reference.
        """
        self._requests += 1
        batches: dict[tuple[str, int, int], set[float]] = {}
        found: dict[tuple[str, int, int, float], Frame] = {}
        for ref in refs:
            if ref.decoder.startswith(f"{IMAGE} "):
                again = reread_image(ref, self._limits, path=self._sources.locate(ref.uri))
                found[ref.uri, ref.width, ref.height, ref.pts_s] = again
            else:
                batches.setdefault((ref.uri, ref.width, ref.height), set()).add(ref.pts_s)
        for (uri, width, height), seconds in batches.items():
            reader = self._reader(uri)
            pts_of = {second: reader.table.pts_at(second) for second in seconds}
            frames = self._frames(reader, list(pts_of.values()), width, height)
            found.update({(uri, width, height, s): frames[pts] for s, pts in pts_of.items()})
        return [_checked(found[ref.uri, ref.width, ref.height, ref.pts_s], ref) for ref in refs]

    def stats(self) -> ReaderStats:
        readers = self._open.values()
        return ReaderStats(
            requests=self._requests,
            hits=self._cache.hits,
            disk_hits=self._disk_hits,
            misses=self._cache.misses - self._disk_hits,
            decoded_frames=self._decoded + sum(reader.decoded_frames for reader in readers),
            seeks=self._seeks + sum(reader.seeks for reader in readers),
            scanned_videos=self._scanned,
            cached_frames=len(self._cache),
            cached_bytes=self._cache.size_bytes,
            open_videos=len(self._open),
        )

    def close(self) -> None:
        while self._open:
            self._close_oldest()

    def _clip(
        self,
        reader: VideoReader,
        request: OverviewRequest | SelectedFramesRequest | ZoomRequest,
        pts: list[int],
        size: FrameSize,
    ) -> Clip:
        frames = self._frames(reader, pts, *reader.target_size(size))
        return Clip(request, tuple(frames[one] for one in pts))

    def _frames(self, reader: VideoReader, pts: list[int], width: int, height: int) -> dict[int, Frame]:
        video, stream = reader.info.video_id, reader.info.stream
        keys = {one: FrameKey(video, stream, one, width, height) for one in pts}
        found = {one: frame for one, key in keys.items() if (frame := self._cache.get(key)) is not None}
        disk = DiskFrameCache(self._disk, f"{reader.scaler} {reader.decoder}") if self._disk else None
        if disk is not None:
            for one in keys.keys() - found.keys():
                if (frame := disk.get(keys[one])) is not None:
                    self._disk_hits += 1
                    self._cache.put(keys[one], frame)
                    found[one] = frame
        for one, frame in found.items():
            if frame.ref.uri != reader.info.uri:  # decoded from a copy, which may go away
                found[one] = Frame(replace(frame.ref, uri=reader.info.uri), frame.rgb)
        decoded = reader.decode_pts(keys.keys() - found.keys(), width, height)
        for one, frame in decoded.items():
            self._cache.put(keys[one], frame)
            if disk is not None:
                disk.put(keys[one], frame)
        return found | decoded

    def _reader(self, uri: str) -> VideoReader:
        """The open reader of this file; a file that changed since is another file."""
        if is_image(uri):
            raise NotAVideoError(f"{uri}: an image has no duration", "the file is an image, not a video")
        path = self._sources.locate(uri)
        key = file_key(uri, path)
        reader = self._open.get(key)
        if reader is None:
            facts = self._facts.get(uri, path)
            reader = self._open[key] = self._reader_type(
                uri, path=path, limits=self._limits, metadata=facts, num_threads=self._threads
            )
            if facts is None:
                self._scanned += 1
                self._facts.put(reader.metadata)
            while len(self._open) > self._videos:
                self._close_oldest()
        self._open.move_to_end(key)
        return reader

    def _close_oldest(self) -> None:
        _, reader = self._open.popitem(last=False)
        self._decoded += reader.decoded_frames
        self._seeks += reader.seeks
        reader.close()


def _checked(frame: Frame, ref: FrameRef) -> Frame:
    got = frame.ref
    if got.digest == ref.digest:
        return frame
    why = "the file has changed" if got.video_id != ref.video_id else "it decodes to other pixels"
    raise FrameMismatchError(
        f"{ref.uri}: the frame at {ref.pts_s:.3f} s differs from its reference, {why}: "
        f"digest {got.digest[:12]} by {got.decoder}, expected {ref.digest[:12]} by {ref.decoder}",
        "a frame shown earlier cannot be shown again",
    )
