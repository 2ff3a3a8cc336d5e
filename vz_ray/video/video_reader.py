"""Exact frames of one video file.

The frame for time t is the last one with pts <= t, t counted from the first
frame that can be decoded. One scan of the packets tells when every frame is
shown, so requests become exact pts before anything is decoded; they are then
reached in ascending order, seeking only where that saves decoding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import av
import blake3
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from vz_ray.video.errors import CorruptVideoError, VideoLimitExceededError
from vz_ray.video.frame import RGB, Frame, FrameRef, FrameSize, VideoInfo
from vz_ray.video.frame_size import target_size
from vz_ray.video.frame_table import (
    FrameTable,
    frame_ticks,
    iter_packets,
    scan_packets,
    table_from_decoded_pts,
)
from vz_ray.video.video_file import VideoLimits, check_duration, check_pixels, compute_video_id, open_video
from vz_ray.video.video_metadata import VideoMetadata

SCALER = "bicubic+accurate_rnd+bitexact"
_FLAGS = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT

_SEEK_COST_FRAMES = 6
"""What a seek costs beyond decoding: finding the packet, refilling the reorder buffer."""

_EXACT_NONREF = frozenset({"h264"})
"""Codecs whose packets say for certain that no other frame refers to theirs."""


class _DecodedFrame(NamedTuple):
    """A frame as the decoder put it out, and its time in ticks."""

    pts: int
    frame: VideoFrame


class VideoReader:
    """One open video. Not thread-safe; close it, or use it as a context manager.

    The first video stream that FFmpeg calls best is read. Rotation metadata is
    applied; the sample aspect ratio is not, as in other readers for models.
    Where pts are missing or repeated (avi, some mpeg), a frame's time is its
    dts, else one average frame after the one before, and the file is decoded
    once to learn all times.

    Args:
        uri: What the video is called.
        path: The file, where that is not `uri`.
        limits: What is refused.
        metadata: What is known of this content already: nothing is scanned then, and the file is not even
            opened before the first frame is asked for.
        threads: A request that spans several GOPs is decoded in as many parts at once, each by a decoder
            with one thread: the same frames at the same CPU time, sooner.

    Attributes:
        metadata: What is known of the file now.
        info: What the file is.
        table: When each frame is shown.
        scaler: What scales frames, as references name it.

    Raises (when opened):
        VideoError: A subclass that says why the file cannot be used.
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
        self._threads = num_threads
        self._others: list[VideoReader] = []
        self._uri, self._limits = uri, limits or VideoLimits()
        self._scaler = VideoReformatter()
        self._container: InputContainer | None = None
        self._out: Iterator[_DecodedFrame] = iter(())
        self._held: _DecodedFrame | None = None
        self._ahead: _DecodedFrame | None = None
        self._counted_to: int | None = None
        self._landed = self._skipping = False
        self._unclean: set[int] = set()
        self._wanted = frozenset[int]()
        self._own_decoded = self._own_seeks = 0
        if metadata is not None:
            check_pixels(uri, metadata.coded_pixels, self._limits)
            self._seekable, self.table = metadata.table.seekable, metadata.table
            self._quarter_turns = metadata.rotation_quarter_turns
        try:
            self.metadata = self._examine() if metadata is None else metadata
            self.info: VideoInfo = self.metadata.info
            check_duration(uri, self.info.duration_s, self._limits)
        except BaseException:
            self.close()
            raise

    @property
    def decoder(self) -> str:
        """What decodes frames, with its version, as references name it."""
        return self.metadata.decoder

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def decoded_frames(self) -> int:
        """Frames that decoders have put out so far."""
        return self._own_decoded + sum(other.decoded_frames for other in self._others)

    @property
    def seeks(self) -> int:
        """Seeks so far, reopenings included."""
        return self._own_seeks + sum(other.seeks for other in self._others)

    def close(self) -> None:
        """Gives the file back; a later request opens it again."""
        for other in self._others:
            other.close()
        self._shut()

    def _shut(self) -> None:
        if self._container is not None:
            self._container.close()
        self._container = self._held = self._ahead = None
        self._out = iter(())

    def read_frames(self, times: Sequence[float], size: FrameSize) -> list[Frame]:
        """The frames shown at `times` (seconds, any order, repeats allowed), in that order.

        Raises:
            VideoDamaged: Nothing can be decoded there.
            OverLimit: Too many frames, or too elongated ones.
        """
        width, height = self.target_size(size)
        found = self.decode_pts([self.table.pts_at(t) for t in times], width, height)
        return [found[self.table.pts_at(t)] for t in times]

    def target_size(self, size: FrameSize) -> tuple[int, int]:
        """`(width, height)` at which this video's frames are delivered."""
        return target_size(self.info.width, self.info.height, size)

    def decode_pts(self, wanted: Iterable[int], width: int, height: int) -> dict[int, Frame]:
        """Frame by pts (ticks, as in `table.pts`), each decoded once, in one pass."""
        parts = self._parts(self._ordered(wanted))
        if len(parts) == 1:
            return self._pass(parts[0], width, height)
        while len(self._others) < len(parts) - 1:
            self._others.append(
                VideoReader(self._uri, path=self._path, limits=self._limits, metadata=self.metadata)
            )
        with ThreadPoolExecutor(len(parts) - 1, thread_name_prefix="decode") as pool:
            readers = zip(self._others, parts[1:], strict=False)
            rest = [pool.submit(reader._pass, part, width, height) for reader, part in readers]
            found = self._pass(parts[0], width, height)
            for others in rest:
                found |= others.result()
        return found

    def _pass(self, ordered: Sequence[int], width: int, height: int) -> dict[int, Frame]:
        self._wanted = frozenset(ordered)
        return {pts: self._deliver(self._reach(pts), width, height) for pts in ordered}

    def _parts(self, ordered: list[int]) -> list[list[int]]:
        """`ordered` in at most `threads` parts of about the same cost, cut where another GOP begins."""
        if self._threads == 1 or not self._seekable or len(ordered) < 2:
            return [ordered]
        gops: dict[int, list[int]] = {}
        for pts in ordered:
            gops.setdefault(self.table.keyframe_before(pts), []).append(pts)
        rank, keys = self.table.count_before, self.table.keyframe_pts
        costs = [rank(within[-1]) - rank(int(keys[max(key, 0)])) + 1 for key, within in gops.items()]
        parts: list[list[int]] = [[]]
        spent, share = 0, sum(costs) / min(self._threads, len(gops))
        for within, cost in zip(gops.values(), costs, strict=True):
            # A GOP goes where more than half of it belongs.
            if parts[-1] and spent + cost / 2 > share * len(parts) and len(parts) < self._threads:
                parts.append([])
            parts[-1] += within
            spent += cost
        return parts

    def _ordered(self, wanted: Iterable[int]) -> list[int]:
        ordered = sorted(set(wanted))
        if len(ordered) > self._limits.max_request_frames:
            raise VideoLimitExceededError(
                f"{self._uri}: {len(ordered)} frames asked for at once, over {self._limits.max_request_frames}",
                f"at most {self._limits.max_request_frames} frames can be fetched at once",
            )
        return ordered

    # Opening

    def _examine(self) -> VideoMetadata:
        """Scans the packets, then decodes the first frame: it fixes the start and the rotation."""
        container, stream = open_video(self._uri, self._limits, self._path)
        with contextlib.closing(container):
            table = scan_packets(container, stream)
        self._seekable = table is not None
        self._restart()
        first = next(self._out, None)
        if first is None:
            raise CorruptVideoError(f"{self._uri}: no frame of it can be decoded", "the video is damaged")
        self._held, self._skipping = first, True
        self._quarter_turns = round(first.frame.rotation / 90) % 4
        self.table = table.starting_at(first.pts) if table else self._count(first)
        codec = self._stream.codec_context.name
        decoder = f"pyav-{av.__version__}/{codec}/{_version('libavcodec')}"
        coded = self._stream.width * self._stream.height
        return VideoMetadata(self._describe(), self.table, self._quarter_turns, decoder, coded)

    def _count(self, first: _DecodedFrame) -> FrameTable:
        table: FrameTable = table_from_decoded_pts(
            [first.pts, *(shown.pts for shown in self._out)], self._stream
        )
        self._restart()
        return table

    def _describe(self) -> VideoInfo:
        width, height = self._stream.width, self._stream.height
        if self._quarter_turns % 2:
            width, height = height, width
        duration = self.table.duration_s
        return VideoInfo(
            video_id=compute_video_id(self._uri, self._path),
            uri=self._uri,
            stream=self._stream.index,
            duration_s=duration,
            fps=len(self.table.pts) / duration,
            width=width,
            height=height,
        )

    # Decoding

    def _reach(self, pts: int) -> _DecodedFrame:
        """The frame at `pts`, or the last decodable one before it where it is damaged."""
        if self._cheaper_to_go_on(pts):
            shown = self._advance(pts)
            if shown is not None and shown.pts == pts:
                return shown
        shown = self._land_before(pts, skipping=True)
        return shown if shown.pts == pts else self._land_before(pts, skipping=False)

    def _cheaper_to_go_on(self, pts: int) -> bool:
        if self._held is None or self._held.pts > pts:
            return False
        key = self._key_before(pts)
        if key < 0:
            return True
        onwards = self.table.count_before(pts) - self.table.count_before(self._held.pts)
        from_key = self.table.count_before(pts) - self.table.count_before(int(self.table.keyframe_pts[key]))
        return onwards <= from_key + _SEEK_COST_FRAMES

    def _key_before(self, pts: int) -> int:
        """Index of the last keyframe at or before `pts` not known to be unclean, or -1."""
        key = self.table.keyframe_before(pts) if self._seekable else -1
        while key in self._unclean:
            key -= 1
        return key

    def _land_before(self, pts: int, skipping: bool) -> _DecodedFrame:
        """Seeks to the keyframe before `pts`, further back while that does not land on it exactly.

        A seek may land later than asked; and what a container calls a keyframe
        may be where a gradual refresh begins, from which no frame is exact.
        """
        key, step = self._key_before(pts), 1
        self._skipping = skipping
        while key >= 0:
            # By pts first: asked for its dts, mp4 lands a whole GOP earlier. By pts, others may land later.
            for stamp in (self.table.keyframe_pts[key], self.table.keyframe_dts[key]):
                self._seek(int(stamp))
                shown = self._advance(pts)
                if shown is not None and self._landed:
                    return shown
            self._unclean.add(key)
            key, step = key - step, step * 2
        self._restart()
        if (shown := self._advance(pts)) is not None:
            return shown
        raise CorruptVideoError(
            f"{self._uri}: nothing can be decoded at {self.table.to_seconds(pts):.3f} s or before",
            "this part of the video is damaged",
        )

    def _advance(self, pts: int) -> _DecodedFrame | None:
        """Decodes up to `pts`; None where what comes first is already later."""
        while self._held is None or self._held.pts < pts:
            if self._ahead is None:
                self._ahead = next(self._out, None)
            if self._ahead is None or self._ahead.pts > pts:
                break
            self._held, self._ahead = self._ahead, None
        return self._held

    def _seek(self, stamp: int) -> None:
        if self._container is None:
            self._container, self._stream = open_video(self._uri, self._limits, self._path)
        self._own_seeks += 1
        self._held = self._ahead = None
        self._out, self._landed = iter(()), False
        # A seek that fails is one that landed nowhere: the caller steps back.
        with contextlib.suppress(av.error.FFmpegError):
            self._container.seek(stamp, stream=self._stream)
            self._out = self._decode(from_key=True)

    def _restart(self) -> None:
        self._shut()
        self._own_seeks += 1
        self._counted_to = None
        self._container, self._stream = open_video(self._uri, self._limits, self._path)
        self._out = self._decode(from_key=False)

    def _decode(self, *, from_key: bool) -> Iterator[_DecodedFrame]:
        """Frames from here on, in order of presentation.

        After a seek (`from_key`), packets before the first keyframe are left
        out, and so are frames shown before it: they refer to frames that were
        not decoded. While `_skipping`, the decoder is told to leave out frames
        that nobody wants and no other frame refers to.
        """
        assert self._container is not None
        container, stream = self._container, self._stream
        context = stream.codec_context
        can_skip = self._seekable and context.name in _EXACT_NONREF
        context.skip_frame = "DEFAULT"
        first_pts: int | None = None
        for packet in iter_packets(container, stream):
            if from_key and first_pts is None:
                if not packet.is_keyframe:
                    continue
                first_pts = packet.pts
            if can_skip:
                whole = not self._skipping or packet.pts in self._wanted
                context.skip_frame = "DEFAULT" if whole else "NONREF"
            # A damaged packet costs its own frames only.
            with contextlib.suppress(av.error.FFmpegError):
                for frame in packet.decode():
                    yield from self._timed(frame, first_pts)
        context.skip_frame = "DEFAULT"
        with contextlib.suppress(av.error.FFmpegError):
            for frame in stream.decode(None):
                yield from self._timed(frame, first_pts)

    def _timed(self, frame: VideoFrame, first_pts: int | None) -> Iterator[_DecodedFrame]:
        self._own_decoded += 1
        if self._seekable:
            if frame.pts is not None and (first_pts is None or frame.pts >= first_pts):
                self._landed = self._landed or frame.pts == first_pts
                yield _DecodedFrame(frame.pts, frame)
            return
        last = self._counted_to
        stamp = frame.dts if frame.dts is not None else frame.pts
        if last is not None and (stamp is None or stamp <= last):
            stamp = last + frame_ticks(self._stream)
        self._counted_to = 0 if stamp is None else stamp
        yield _DecodedFrame(self._counted_to, frame)

    # Delivering

    def _deliver(self, shown: _DecodedFrame, width: int, height: int) -> Frame:
        rgb = self._scaled(shown.frame, width, height)
        return Frame(self._ref(shown.pts, width, height, rgb), rgb)

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

    def _scaled(self, frame: VideoFrame, width: int, height: int) -> RGB:
        """Scaled before it is turned: the smaller array is the cheaper one to turn."""
        sideways = self._quarter_turns % 2
        scaled = self._scaler.reformat(
            frame,
            width=height if sideways else width,
            height=width if sideways else height,
            format="rgb24",
            interpolation=_FLAGS,
            dst_color_range=ColorRange.JPEG,
            threads=1,
        )
        rgb: RGB = np.ascontiguousarray(np.rot90(scaled.to_ndarray(), self._quarter_turns), dtype=np.uint8)
        rgb.flags.writeable = False
        return rgb


def _version(library: str) -> str:
    return ".".join(str(part) for part in av.library_versions[library])
