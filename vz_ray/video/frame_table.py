"""When every frame of a video is shown, from its packets alone."""

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

_ROUNDING_S = 1e-9
"""A time this close below a frame's means that frame: float noise of start + j / fps, below any tick."""

_WITHOUT_PTS = frozenset({"avi"})
"""Containers that hold no pts; FFmpeg makes some up, out of order where there are B-frames."""


@dataclass(frozen=True, slots=True)
class FrameTable:
    """Presentation times of one stream, in ticks of `time_base`.

    Attributes:
        pts: `int64 [frames]`, ascending, distinct; of frames that are shown.
        keyframe_pts: `int64 [keys]`, ascending.
        keyframe_dts: `int64 [keys]`, to seek by where seeking by pts lands later than that key.
        end_pts: When the last frame stops being shown.
        time_base: Seconds per tick.
        seekable: False where packets do not tell the times of frames: such a
            file is only ever decoded from its beginning, since a frame's time
            is then known only by counting.
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
        """Seconds from the first frame to `pts`."""
        return float((pts - self.start_pts) * self.time_base)

    def pts_at(self, second: float) -> int:
        """pts of the frame shown at `second`: the last that is not later; the first if all are."""
        ticks = (second + _ROUNDING_S) * self.time_base.denominator / self.time_base.numerator
        # An integer, as the table has: for a float the whole table would be converted.
        index = int(np.searchsorted(self.pts, self.start_pts + math.floor(ticks), side="right")) - 1
        return int(self.pts[max(index, 0)])

    def count_before(self, pts: int) -> int:
        """How many frames are shown before `pts`."""
        return int(np.searchsorted(self.pts, pts, side="left"))

    def keyframe_before(self, pts: int) -> int:
        """Index of the last keyframe not later than `pts`, or -1."""
        return int(np.searchsorted(self.keyframe_pts, pts, side="right")) - 1

    def starting_at(self, first: int) -> FrameTable:
        """Without the frames before `first`, the first one that can really be decoded."""
        if first == self.start_pts:
            return self
        kept = np.unique(np.append(self.pts[self.pts > first], np.int64(first)))
        end = max(self.end_pts, int(kept[-1]) + 1)
        return FrameTable(kept, self.keyframe_pts, self.keyframe_dts, end, self.time_base, self.seekable)


def scan_packets(container: InputContainer, stream: VideoStream) -> FrameTable | None:
    """Reads every packet and decodes none.

    None where the packets do not tell the times of frames, because pts are
    missing, guessed or repeated, or where there is no packet: then only
    decoding does, see `counted`.
    """
    if container.format.name in _WITHOUT_PTS:
        return None
    shown: list[int] = []
    keys: list[tuple[int, int]] = []
    last = end = None
    ticks = frame_ticks(stream)
    for packet in iter_packets(container, stream):
        pts = packet.pts
        if pts is None:
            return None
        if packet.is_keyframe:
            keys.append((pts, pts if packet.dts is None else packet.dts))
        if not packet.is_discard:
            shown.append(pts)
            if last is None or pts > last:
                last, end = pts, pts + (packet.duration or ticks)
    distinct = np.unique(np.array(shown, dtype=np.int64))
    if end is None or len(distinct) < len(shown):
        return None
    keys.sort()
    assert stream.time_base is not None
    return FrameTable(
        pts=distinct,
        keyframe_pts=np.array([pts for pts, _ in keys], dtype=np.int64),
        keyframe_dts=np.array([dts for _, dts in keys], dtype=np.int64),
        end_pts=end,
        time_base=stream.time_base,
        seekable=True,
    )


def table_from_decoded_pts(times: list[int], stream: VideoStream) -> FrameTable:
    """The table of a file whose packets do not tell it, from the times of all its decoded frames."""
    nothing = np.empty(0, dtype=np.int64)
    assert stream.time_base is not None
    pts = np.array(times, dtype=np.int64)
    return FrameTable(
        pts, nothing, nothing, int(pts[-1]) + frame_ticks(stream), stream.time_base, seekable=False
    )


def iter_packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    """Packets of the stream until the file ends or is cut off; the flushing packet is left out."""
    demuxed = container.demux(stream)
    while True:
        try:
            packet = next(demuxed, None)
        except av.error.FFmpegError:
            return
        except IndexError:  # of a stream that turned up in mid-file, which PyAV does not know: go on after it
            demuxed = container.demux(stream)
            continue
        if packet is None:
            return
        if packet.size > 0:
            yield packet


def frame_ticks(stream: VideoStream) -> int:
    """Length of one frame at the average rate, in ticks, at least 1."""
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    assert stream.time_base is not None
    return max(1, round(1 / (rate * stream.time_base)))
