"""Video files for tests, and a simple reference decoder."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation
from numpy.typing import NDArray

from vz_ray.video.frame import Frame, FrameSize
from vz_ray.video.video_reader import VideoReader


@dataclass(frozen=True)
class VideoSpec:
    """Parameters of a test video; `times` are in ticks of 1 / `rate` seconds, one per frame."""

    name: str
    codec: str = "libx264"
    frames: int = 320
    rate: int = 25
    gop: int = 250
    b_frames: int = 2
    options: dict[str, str] = field(default_factory=dict)
    start: int = 0
    uneven: bool = False
    width: int = 96
    height: int = 64
    pix_fmt: str = "yuv420p"

    def times(self) -> list[int]:
        if not self.uneven:
            return [self.start + i for i in range(self.frames)]
        gaps = np.random.default_rng(5).integers(1, 9, self.frames)
        return [self.start + int(t) for t in np.cumsum(gaps)]


def write_video(folder: Path, spec: VideoSpec) -> Path:
    """Encode a video of pairwise different frames.

    SVT-AV1 gives the calling thread real-time priority when run as root, and every child process inherits it.
    So it encodes in a process of its own.
    """
    if spec.codec == "libsvtav1":
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(encode_video, folder, spec).result(timeout=120)
    return encode_video(folder, spec)


def encode_video(folder: Path, spec: VideoSpec) -> Path:
    path = folder / spec.name
    with av.open(str(path), "w") as container:
        stream = container.add_stream(spec.codec, rate=spec.rate, options=dict(spec.options))
        stream.width, stream.height, stream.pix_fmt = spec.width, spec.height, spec.pix_fmt
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = spec.gop, spec.b_frames
        stream.codec_context.time_base = Fraction(1, spec.rate)
        for index, ticks in enumerate(spec.times()):
            frame = av.VideoFrame.from_ndarray(draw_frame(index, spec.width, spec.height), format="rgb24")
            frame.pts, frame.time_base = ticks, Fraction(1, spec.rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def rotate_video(path: Path, to: Path, degrees: int) -> Path:
    """Copy the packets to a file with rotation metadata; re-encoding could change the pixels."""
    with av.open(str(path)) as source, av.open(str(to), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        stream.set_display_rotation(degrees)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    return to


def stretch_video(path: Path, to: Path, factor: int) -> Path:
    """Copy the packets with `factor` times the duration."""
    with av.open(str(path)) as source, av.open(str(to), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None and packet.pts is not None:
                packet.pts, packet.dts = packet.pts * factor, packet.dts * factor
                packet.duration = (packet.duration or 0) * factor
                packet.stream = stream
                container.mux(packet)
    return to


def shift_video(path: Path, to: Path, seconds: float) -> Path:
    """Copy the packets with shifted times; an edit list cuts frames before 0."""
    with av.open(str(path)) as source, av.open(str(to), "w") as container:
        source_stream = source.streams.video[0]
        stream = container.add_stream_from_template(source_stream)
        assert source_stream.time_base is not None
        ticks = round(seconds / source_stream.time_base)
        for packet in source.demux(source_stream):
            if packet.dts is not None and packet.pts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts + ticks, packet.dts + ticks, stream
                container.mux(packet)
    return to


def draw_frame(index: int, width: int, height: int) -> NDArray[np.uint8]:
    """Draw a moving gradient with a block of noise, which a codec cannot copy."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([(x * 2 + index * 3) % 256, (y * 3 + index * 5) % 256, (x + y + index) % 256], axis=-1)
    noise = np.random.default_rng(index).integers(0, 256, (16, 16, 3))
    left = (index * 7) % (width - 16)
    image[8:24, left : left + 16] = noise
    return image.astype(np.uint8)


def random_image(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return a noise image."""
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)


@dataclass(frozen=True)
class ReferenceDecode:
    """All frames of a file, decoded sequentially; `pts` ascend, in seconds from the first frame."""

    pts: NDArray[np.float64]
    frames: list[av.VideoFrame]

    def frame_index_at(self, second: float) -> int:
        """Return the index of the frame at `second`."""
        return max(0, int(np.searchsorted(self.pts, second + 1e-9, side="right")) - 1)

    def rgb(self, index: int, width: int, height: int) -> NDArray[np.uint8]:
        flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
        scaled = self.frames[index].reformat(
            width=width, height=height, format="rgb24", interpolation=flags, dst_color_range="JPEG"
        )
        return scaled.to_ndarray()


def decode_sequentially(path: Path) -> ReferenceDecode:
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        assert stream is not None
        assert stream.time_base is not None
        stream.thread_count = 1
        frames = [frame for frame in container.decode(stream) if isinstance(frame, av.VideoFrame)]
        pts_ticks = [frame.pts for frame in frames]
        if path.suffix in (".avi", ".mpg"):  # no reliable pts, constant rate
            assert stream.average_rate is not None
            pts_ticks = [round(i / stream.average_rate / stream.time_base) for i in range(len(frames))]
        pts = np.array([float((ticks - pts_ticks[0]) * stream.time_base) for ticks in pts_ticks])
    return ReferenceDecode(pts, frames)


def draw_query_times(reference: ReferenceDecode, count: int, seed: int) -> Sequence[float]:
    """Return random times within and outside the file, frame times, and times just before frames."""
    rng = np.random.default_rng(seed)
    end = float(reference.pts[-1])
    frame_times = rng.choice(reference.pts, min(count // 4, len(reference.pts)), replace=False)
    return [*rng.uniform(-0.5, end + 1, count), *frame_times, *(frame_times - 1e-4), 0.0, end]


def read_frames(reader: VideoReader, times: Sequence[float], size: FrameSize) -> list[Frame]:
    """Return the frames at `times` (seconds, any order, with repetitions), in the same order."""
    pts = [reader.table.pts_at(second) for second in times]
    frames = reader.decode_pts(pts, *reader.target_size(size))
    return [frames[frame_pts] for frame_pts in pts]
