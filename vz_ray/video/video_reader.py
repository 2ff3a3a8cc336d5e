"""Exact frames of one video file.

The frame for time t is the last one with pts <= t, where t counts from the first decodable frame.
One scan of the packets yields all frame times, so requests are mapped to exact pts before decoding.
Frames are decoded in ascending order, with seeks only if they save decoding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import av
import blake3
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from vz_ray.video.errors import CorruptVideoError, VideoLimitExceededError
from vz_ray.video.frame import RGB, Frame, FrameRef, FrameSize, VideoInfo
from vz_ray.video.frame_scaling import SCALER, scale_frame, target_size
from vz_ray.video.frame_table import (
    FrameTable,
    frame_ticks,
    iter_packets,
    scan_packets,
    table_from_decoded_pts,
)
from vz_ray.video.video_file import VideoLimits, check_duration, check_pixels, compute_video_id, open_video
from vz_ray.video.video_metadata import VideoMetadata

_SEEK_COST_FRAMES = 6
"""Cost of a seek in frames: finding the packet, refilling the reorder buffer."""

_CODECS_WITH_EXACT_NONREF = frozenset({"h264"})
"""Codecs whose packets mark reliably that no other frame refers to them."""


class _DecodedFrame(NamedTuple):
    """Frame output by the decoder, with its time in ticks."""

    pts: int
    frame: VideoFrame


class VideoReader:
    """Reader of one video. Not thread-safe. Close it, or use it as a context manager.

    FFmpeg selects the best stream. Rotation metadata is applied; the sample aspect ratio is not, as
    in other readers for models. If pts are missing or repeated (avi, some mpeg), the time of a frame
    is its dts, or one average frame duration after the previous frame. Such a file is decoded once
    to get all times.

    Args:
        uri: URI in references and errors.
        path: Local path; defaults to `uri`.
        metadata: Cached metadata of this content. The file is then opened at the first request, and
            not scanned.
        num_threads: Number of single-threaded decoders that decode a request across several GOPs in
            parallel. The frames are identical.

    Attributes:
        table: Presentation times of all frames.
        scaler: Name of the scaler in references.

    Raises (when opened):
        VideoError: The subclass names the cause.
    """

    scaler = SCALER

    def __init__(
        self,
        uri: str,
        *,
        path: str | None = None,
        limits: VideoLimits | None = None,
        metadata: VideoMetadata | None = None,
        num_threads: int = 1,
    ) -> None:
        self._path = path
        self._num_threads = num_threads
        self._helpers: list[VideoReader] = []
        self._uri, self._limits = uri, limits or VideoLimits()
        self._scaler = VideoReformatter()
        self._container: InputContainer | None = None
        self._decoded: Iterator[_DecodedFrame] = iter(())
        self._current: _DecodedFrame | None = None
        self._next: _DecodedFrame | None = None
        self._last_counted_pts: int | None = None
        self._hit_keyframe = self._skip_unused = False
        self._inexact_keyframes: set[int] = set()
        self._requested_pts = frozenset[int]()
        self._own_decoded = self._own_seeks = 0
        if metadata is not None:
            check_pixels(uri, metadata.coded_pixels, self._limits)
            self._seekable, self.table = metadata.table.seekable, metadata.table
            self._quarter_turns = metadata.rotation_quarter_turns
        try:
            self.metadata = self._scan() if metadata is None else metadata
            self.info: VideoInfo = self.metadata.info
            check_duration(uri, self.info.duration_s, self._limits)
        except BaseException:
            self.close()
            raise

    @property
    def decoder(self) -> str:
        """Decoder and version, as in references."""
        return self.metadata.decoder

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def decoded_frames(self) -> int:
        """Number of frames output by the decoders so far."""
        return self._own_decoded + sum(helper.decoded_frames for helper in self._helpers)

    @property
    def seeks(self) -> int:
        """Number of seeks and reopenings so far."""
        return self._own_seeks + sum(helper.seeks for helper in self._helpers)

    def close(self) -> None:
        """Close the file; a later request opens it again."""
        for helper in self._helpers:
            helper.close()
        self._close_container()

    def _close_container(self) -> None:
        if self._container is not None:
            self._container.close()
        self._container = self._current = self._next = None
        self._decoded = iter(())

    def target_size(self, size: FrameSize) -> tuple[int, int]:
        """Return the `(width, height)` of the returned frames."""
        return target_size(self.info.width, self.info.height, size)

    def decode_pts(self, pts: Iterable[int], width: int, height: int) -> dict[int, Frame]:
        """Return frames by pts (ticks, as in `table.pts`), each decoded once, in one pass.

        Raises:
            CorruptVideoError: No frame can be decoded at one of the times.
            VideoLimitExceededError: Too many frames.
        """
        parts = self._split_by_gop(self._sort_and_check(pts))
        if len(parts) == 1:
            return self._decode_part(parts[0], width, height)
        while len(self._helpers) < len(parts) - 1:
            self._helpers.append(VideoReader(self._uri, path=self._path, limits=self._limits, metadata=self.metadata))
        with ThreadPoolExecutor(len(parts) - 1, thread_name_prefix="decode") as pool:
            readers = zip(self._helpers, parts[1:], strict=False)
            futures = [pool.submit(reader._decode_part, part, width, height) for reader, part in readers]
            frames = self._decode_part(parts[0], width, height)
            for future in futures:
                frames |= future.result()
        return frames

    def _decode_part(self, ordered: Sequence[int], width: int, height: int) -> dict[int, Frame]:
        self._requested_pts = frozenset(ordered)
        return {pts: self._to_frame(self._decode_at(pts), width, height) for pts in ordered}

    def _split_by_gop(self, ordered: list[int]) -> list[list[int]]:
        """Split `ordered` into up to `num_threads` parts of similar cost, at GOP boundaries."""
        if self._num_threads == 1 or not self._seekable or len(ordered) < 2:
            return [ordered]
        gops: dict[int, list[int]] = {}
        for pts in ordered:
            gops.setdefault(self.table.keyframe_before(pts), []).append(pts)
        count_before, keyframe_pts = self.table.count_before, self.table.keyframe_pts
        costs = [
            count_before(gop_pts[-1]) - count_before(int(keyframe_pts[max(key, 0)])) + 1
            for key, gop_pts in gops.items()
        ]
        parts: list[list[int]] = [[]]
        total, cost_per_part = 0, sum(costs) / min(self._num_threads, len(gops))
        for gop_pts, cost in zip(gops.values(), costs, strict=True):
            # A GOP belongs to the part that contains its middle.
            is_next_part = total + cost / 2 > cost_per_part * len(parts)
            if parts[-1] and is_next_part and len(parts) < self._num_threads:
                parts.append([])
            parts[-1] += gop_pts
            total += cost
        return parts

    def _sort_and_check(self, pts: Iterable[int]) -> list[int]:
        ordered = sorted(set(pts))
        limit = self._limits.max_request_frames
        if len(ordered) > limit:
            raise VideoLimitExceededError(
                f"{self._uri}: request for {len(ordered)} frames exceeds the limit of {limit}; request fewer frames",
                f"at most {limit} frames can be fetched at once",
            )
        return ordered

    # Opening

    def _scan(self) -> VideoMetadata:
        """Scan the packets, then decode the first frame, which determines start and rotation."""
        container, stream = open_video(self._uri, self._limits, self._path)
        with contextlib.closing(container):
            table = scan_packets(container, stream)
        self._seekable = table is not None
        self._restart()
        first = next(self._decoded, None)
        if first is None:
            raise CorruptVideoError(f"{self._uri}: no frame can be decoded", "the video is damaged")
        self._current, self._skip_unused = first, True
        self._quarter_turns = round(first.frame.rotation / 90) % 4
        self.table = table.starting_at(first.pts) if table else self._count_frames(first)
        codec = self._stream.codec_context.name
        decoder = f"pyav-{av.__version__}/{codec}/{_version('libavcodec')}"
        coded_pixels = self._stream.width * self._stream.height
        return VideoMetadata(self._video_info(), self.table, self._quarter_turns, decoder, coded_pixels)

    def _count_frames(self, first: _DecodedFrame) -> FrameTable:
        table: FrameTable = table_from_decoded_pts(
            [first.pts, *(decoded.pts for decoded in self._decoded)], self._stream
        )
        self._restart()
        return table

    def _video_info(self) -> VideoInfo:
        width, height = self._stream.width, self._stream.height
        if self._quarter_turns % 2:
            width, height = height, width
        duration_s = self.table.duration_s
        return VideoInfo(
            video_id=compute_video_id(self._uri, self._path),
            uri=self._uri,
            stream=self._stream.index,
            duration_s=duration_s,
            fps=len(self.table.pts) / duration_s,
            width=width,
            height=height,
        )

    # Decoding

    def _decode_at(self, pts: int) -> _DecodedFrame:
        """Return the frame at `pts`, or the last decodable frame before it if it is corrupt."""
        if self._is_seek_unnecessary(pts):
            decoded = self._decode_to(pts)
            if decoded is not None and decoded.pts == pts:
                return decoded
        decoded = self._seek_and_decode(pts, skip_unused=True)
        return decoded if decoded.pts == pts else self._seek_and_decode(pts, skip_unused=False)

    def _is_seek_unnecessary(self, pts: int) -> bool:
        """Return whether decoding from the current frame is cheaper than a seek."""
        if self._current is None or self._current.pts > pts:
            return False
        key = self._exact_keyframe_before(pts)
        if key < 0:
            return True
        table = self.table
        from_current = table.count_before(pts) - table.count_before(self._current.pts)
        from_keyframe = table.count_before(pts) - table.count_before(int(table.keyframe_pts[key]))
        return from_current <= from_keyframe + _SEEK_COST_FRAMES

    def _exact_keyframe_before(self, pts: int) -> int:
        """Return the index of the last keyframe at or before `pts` not known to be inexact, or -1."""
        key = self.table.keyframe_before(pts) if self._seekable else -1
        while key in self._inexact_keyframes:
            key -= 1
        return key

    def _seek_and_decode(self, pts: int, skip_unused: bool) -> _DecodedFrame:
        """Seek to the keyframe before `pts`, or further back until a seek reaches its keyframe.

        A seek may end after its target. A keyframe of the container may also start a gradual
        refresh, from which no frame is exact.
        """
        key, step = self._exact_keyframe_before(pts), 1
        self._skip_unused = skip_unused
        while key >= 0:
            # A seek by dts ends one GOP early in mp4; a seek by pts ends late in other containers.
            for timestamp in (self.table.keyframe_pts[key], self.table.keyframe_dts[key]):
                self._seek(int(timestamp))
                decoded = self._decode_to(pts)
                if decoded is not None and self._hit_keyframe:
                    return decoded
            self._inexact_keyframes.add(key)
            key, step = key - step, step * 2
        self._restart()
        if (decoded := self._decode_to(pts)) is not None:
            return decoded
        raise CorruptVideoError(f"{self._uri}: no frame can be decoded at or before {self.table.to_seconds(pts):.3f} s")

    def _decode_to(self, pts: int) -> _DecodedFrame | None:
        """Decode up to `pts`. Returns None if the first decoded frame is later."""
        while self._current is None or self._current.pts < pts:
            if self._next is None:
                self._next = next(self._decoded, None)
            if self._next is None or self._next.pts > pts:
                break
            self._current, self._next = self._next, None
        return self._current

    def _seek(self, timestamp: int) -> None:
        if self._container is None:
            self._container, self._stream = open_video(self._uri, self._limits, self._path)
        self._own_seeks += 1
        self._current = self._next = None
        self._decoded, self._hit_keyframe = iter(()), False
        # After a failed seek the caller steps back to an earlier keyframe.
        with contextlib.suppress(av.error.FFmpegError):
            self._container.seek(timestamp, stream=self._stream)
            self._decoded = self._decode(from_keyframe=True)

    def _restart(self) -> None:
        self._close_container()
        self._own_seeks += 1
        self._last_counted_pts = None
        self._container, self._stream = open_video(self._uri, self._limits, self._path)
        self._decoded = self._decode(from_keyframe=False)

    def _decode(self, *, from_keyframe: bool) -> Iterator[_DecodedFrame]:
        """Yield frames from the current position, in presentation order.

        After a seek (`from_keyframe`), packets and frames before the first keyframe are dropped,
        because they refer to frames that were not decoded. If `_skip_unused` is set, the decoder
        skips frames that are neither requested nor referenced.
        """
        assert self._container is not None
        container, stream = self._container, self._stream
        context = stream.codec_context
        can_skip = self._seekable and context.name in _CODECS_WITH_EXACT_NONREF
        context.skip_frame = "DEFAULT"
        first_pts: int | None = None
        for packet in iter_packets(container, stream):
            if from_keyframe and first_pts is None:
                if not packet.is_keyframe:
                    continue
                first_pts = packet.pts
            if can_skip:
                is_needed = not self._skip_unused or packet.pts in self._requested_pts
                context.skip_frame = "DEFAULT" if is_needed else "NONREF"
            # A corrupt packet loses its own frames only.
            with contextlib.suppress(av.error.FFmpegError):
                for frame in packet.decode():
                    yield from self._with_time(frame, first_pts)
        context.skip_frame = "DEFAULT"
        with contextlib.suppress(av.error.FFmpegError):
            for frame in stream.decode(None):
                yield from self._with_time(frame, first_pts)

    def _with_time(self, frame: VideoFrame, first_pts: int | None) -> Iterator[_DecodedFrame]:
        self._own_decoded += 1
        if self._seekable:
            if frame.pts is not None and (first_pts is None or frame.pts >= first_pts):
                self._hit_keyframe = self._hit_keyframe or frame.pts == first_pts
                yield _DecodedFrame(frame.pts, frame)
            return
        last_pts = self._last_counted_pts
        pts = frame.dts if frame.dts is not None else frame.pts
        if last_pts is not None and (pts is None or pts <= last_pts):
            pts = last_pts + frame_ticks(self._stream)
        self._last_counted_pts = 0 if pts is None else pts
        yield _DecodedFrame(self._last_counted_pts, frame)

    # Scaling

    def _to_frame(self, decoded: _DecodedFrame, width: int, height: int) -> Frame:
        rgb = scale_frame(self._scaler, decoded.frame, width, height, self._quarter_turns)
        return Frame(self._ref(decoded.pts, width, height, rgb), rgb)

    def _ref(self, pts: int, width: int, height: int, rgb: RGB) -> FrameRef:
        return FrameRef(
            video_id=self.info.video_id,
            uri=self._uri,
            stream=self.info.stream,
            pts_s=self.table.to_seconds(pts),
            width=width,
            height=height,
            scaler=self.scaler,
            decoder=self.decoder,
            digest=blake3.blake3(rgb.data).hexdigest(),
        )


def _version(library: str) -> str:
    return ".".join(str(part) for part in av.library_versions[library])
