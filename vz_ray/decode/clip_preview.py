"""A clip for a person: images in a directory, and what it took to get them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vz_ray.utils.errors import UserError
from vz_ray.video.clip_reader import ClipReader, ReaderStats
from vz_ray.video.frame import Frame, FrameSize, OverviewRequest, VideoError, VideoInfo, ZoomRequest
from vz_ray.video.image_encoding import encode_image


@dataclass(frozen=True, slots=True)
class ClipPreview:
    """What `vz-ray clip` prints.

    Attributes:
        info: The video.
        frames: In order, with their times.
        files: Images written, one per frame; none where only times were asked for.
        stats: What reading them took; a file never seen before is scanned first.
        seconds: Wall time of it, opening included, writing images not.
    """

    info: VideoInfo
    frames: tuple[Frame, ...]
    files: tuple[Path, ...]
    stats: ReaderStats
    seconds: float

    @property
    def summary(self) -> str:
        """One line: where the frames came from, at what cost."""
        stats = self.stats
        how = f"{stats.disk_hits} from the cache, {stats.misses} decoded"
        if stats.misses:
            how += f" ({stats.decoded_frames} frames put out by the decoder, {stats.seeks} seeks)"
        scanned = "scanned, " if stats.scanned_videos else ""
        return f"{scanned}{len(self.frames)} frames: {how}, {self.seconds * 1e3:.0f} ms"


def preview_clip(
    video: str, request: OverviewRequest | ZoomRequest, size: FrameSize, out: Path | None, reader: ClipReader
) -> ClipPreview:
    """Reads a clip as training would, and writes its frames to `out` as PNG files named by their times.

    Raises:
        UserError: The video cannot be read as asked, or `out` cannot be written.
    """
    began = time.perf_counter()
    try:
        if isinstance(request, OverviewRequest):
            clip = reader.overview(video, request, size)
        else:
            clip = reader.zoom(video, request, size)
        info = reader.probe(video)
    except VideoError as error:
        raise UserError(str(error)) from error
    seconds = time.perf_counter() - began
    stats = reader.stats()
    reader.close()
    files = _write(clip.frames, out) if out is not None else ()
    return ClipPreview(info, clip.frames, files, stats, seconds)


def _write(frames: tuple[Frame, ...], out: Path) -> tuple[Path, ...]:
    files = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for number, frame in enumerate(frames):
            files.append(out / f"{number:03d}-{frame.pts_s:.3f}s.png")
            files[-1].write_bytes(encode_image(frame.rgb))
    except OSError as error:
        raise UserError(f"cannot write images to {out}: {error.strerror or error}") from error
    return tuple(files)


def print_preview(shown: ClipPreview) -> None:
    """Prints the video, each frame with its time and file, and the plan."""
    info, console = shown.info, Console(highlight=False)
    console.print(
        f"{info.uri}: {info.width}x{info.height}, {info.duration_s:.2f} s, {info.fps:.2f} fps on average"
    )
    table = Table("frame", "time s", "size", *(["file"] if shown.files else []), box=None)
    for number, frame in enumerate(shown.frames):
        file = [str(shown.files[number])] if shown.files else []
        table.add_row(str(number), f"{frame.pts_s:.3f}", f"{frame.ref.width}x{frame.ref.height}", *file)
    console.print(table)
    console.print(shown.summary)
