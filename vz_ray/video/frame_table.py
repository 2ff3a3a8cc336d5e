"""Presentation times of all frames of a video, read from its packets without decoding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray

_ROUNDING_TOLERANCE_S = 1e-9
"""Tolerance for rounding errors of start + j / fps; smaller than any tick."""

_CONTAINERS_WITHOUT_PTS = frozenset({"avi"})
"""Containers without pts. FFmpeg guesses them, out of order if there are B-frames."""


@dataclass(frozen=True, slots=True)
class FrameTable:
    """Presentation times of one stream, in ticks of `time_base`.

    Attributes:
        pts: `int64 [frames]`, ascending and distinct; displayed frames only.
        keyframe_pts: `int64 [keyframes]`, ascending.
        keyframe_dts: `int64 [keyframes]`, for seeks when a seek by pts misses the keyframe.
        end_pts: End of the last frame.
        time_base: Seconds per tick.
        seekable: False if the packets have no reliable times. The file is then decoded from the
            start, and frame times come from counting.
    """

    pts: NDArray[np.int64]
    keyframe_pts: NDArray[np.int64]
    keyframe_dts: NDArray[np.int64]
    end_pts: int
    time_base: Fraction
    seekable: bool

    @property
    def start_pts(self) -> int:
        return int(self.pts[0])

    @property
    def duration_s(self) -> float:
        return float((self.end_pts - self.start_pts) * self.time_base)

    def to_seconds(self, pts: int) -> float:
        """Convert `pts` to seconds from the first frame."""
        return float((pts - self.start_pts) * self.time_base)

    def pts_at(self, second: float) -> int:
        """Return the pts of the last frame at or before `second`, or of the first frame."""
        ticks = (second + _ROUNDING_TOLERANCE_S) * self.time_base.denominator / self.time_base.numerator
        # An integer, because searchsorted converts the whole array for a float.
        index = int(np.searchsorted(self.pts, self.start_pts + math.floor(ticks), side="right")) - 1
        return int(self.pts[max(index, 0)])

    def count_before(self, pts: int) -> int:
        """Return the number of frames before `pts`."""
        return int(np.searchsorted(self.pts, pts, side="left"))

    def keyframe_before(self, pts: int) -> int:
        """Return the index of the last keyframe at or before `pts`, or -1."""
        return int(np.searchsorted(self.keyframe_pts, pts, side="right")) - 1

    def starting_at(self, first: int) -> FrameTable:
        """Return the table without the frames before `first`, the first decodable frame."""
        if first == self.start_pts:
            return self
        pts = np.unique(np.append(self.pts[self.pts > first], np.int64(first)))
        end = max(self.end_pts, int(pts[-1]) + 1)
        return FrameTable(pts, self.keyframe_pts, self.keyframe_dts, end, self.time_base, self.seekable)


def scan_packets(container: InputContainer, stream: VideoStream) -> FrameTable | None:
    """Build the table from all packets, without decoding.

    Returns None if the packets have no reliable times: pts are missing, guessed or repeated, or
    the file has no packets. `table_from_decoded_pts` then builds the table.
    """
    if container.format.name in _CONTAINERS_WITHOUT_PTS:
        return None
    displayed: list[int] = []
    keyframes: list[tuple[int, int]] = []
    last = end = None
    ticks = frame_ticks(stream)
    for packet in iter_packets(container, stream):
        pts = packet.pts
        if pts is None:
            return None
        if packet.is_keyframe:
            keyframes.append((pts, pts if packet.dts is None else packet.dts))
        if not packet.is_discard:
            displayed.append(pts)
            if last is None or pts > last:
                last, end = pts, pts + (packet.duration or ticks)
    distinct = np.unique(np.array(displayed, dtype=np.int64))
    if end is None or len(distinct) < len(displayed):
        return None
    keyframes.sort()
    assert stream.time_base is not None
    return FrameTable(
        pts=distinct,
        keyframe_pts=np.array([pts for pts, _ in keyframes], dtype=np.int64),
        keyframe_dts=np.array([dts for _, dts in keyframes], dtype=np.int64),
        end_pts=end,
        time_base=stream.time_base,
        seekable=True,
    )


def table_from_decoded_pts(times: list[int], stream: VideoStream) -> FrameTable:
    """Build the table of a file without reliable packet times from the times of all decoded frames."""
    no_keyframes = np.empty(0, dtype=np.int64)
    assert stream.time_base is not None
    pts = np.array(times, dtype=np.int64)
    return FrameTable(
        pts, no_keyframes, no_keyframes, int(pts[-1]) + frame_ticks(stream), stream.time_base, seekable=False
    )


def iter_packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    """Yield the packets of the stream to the end of the file or its truncation, without the flush packet."""
    demuxed = container.demux(stream)
    while True:
        try:
            packet = next(demuxed, None)
        except av.error.FFmpegError:
            return
        except IndexError:  # packet of a stream that appears in mid-file, unknown to PyAV
            demuxed = container.demux(stream)
            continue
        if packet is None:
            return
        if packet.size > 0:
            yield packet


def frame_ticks(stream: VideoStream) -> int:
    """Return the duration of a frame at the average rate, in ticks, at least 1."""
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    assert stream.time_base is not None
    return max(1, round(1 / (rate * stream.time_base)))
