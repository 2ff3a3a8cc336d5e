"""Preview of a clip: PNG files and the cost of reading the frames."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vz_ray.config.episode import EpisodeConfig
from vz_ray.families import ImageProcessorSettings, load_family
from vz_ray.utils.errors import UserError
from vz_ray.video.clip_reader import ClipReader, ReaderStats
from vz_ray.video.errors import VideoError
from vz_ray.video.frame import Frame, FrameSize, OverviewRequest, VideoInfo, ZoomRequest
from vz_ray.video.image_encoding import encode_image
from vz_ray.video.image_grid import ImageGrid

_QWEN2_5_VL_GRID = ImageGrid(patch_size=14, merge_size=2)


@dataclass(frozen=True, slots=True)
class ClipPreview:
    """Output of `vz-ray clip`: `files` has one image per frame, or none without an output directory."""

    info: VideoInfo
    frames: tuple[Frame, ...]
    files: tuple[Path, ...]
    stats: ReaderStats
    seconds: float

    @property
    def summary(self) -> str:
        """One line: cache hits, decoded frames, wall time."""
        stats = self.stats
        cost = f"{stats.disk_hits} from the cache, {stats.misses} decoded"
        if stats.misses:
            cost += f" ({stats.decoded_frames} frames output by the decoder, {stats.seeks} seeks)"
        scanned = "scanned, " if stats.scanned_videos else ""
        return f"{scanned}{len(self.frames)} frames: {cost}, {self.seconds * 1e3:.0f} ms"


def preview_size(model: Path | None, max_pixels: int) -> FrameSize:
    """Return the size of the frames that a model sees.

    Args:
        model: Checkpoint directory; None for Qwen2.5-VL.
        max_pixels: Maximum area of a frame, pixels.

    Raises:
        UserError: The checkpoint is not supported, or its image processor resizes frames of `max_pixels`.
    """
    min_pixels = min(EpisodeConfig.min_pixels, max_pixels)
    if model is None:
        return _QWEN2_5_VL_GRID.frame_size(min_pixels, max_pixels)
    settings = ImageProcessorSettings.load(model, load_family(model))
    smallest = max(settings.min_pixels, settings.grid.side**2)
    if not smallest <= max_pixels <= settings.max_pixels:
        raise UserError(
            f"{settings.family}: --max-pixels is {max_pixels}; the image processor of {str(model)!r} supports "
            f"{smallest} to {settings.max_pixels}"
        )
    return settings.grid.frame_size(max(min_pixels, smallest), max_pixels)


def preview_clip(
    video: str, request: OverviewRequest | ZoomRequest, size: FrameSize, out: Path | None, reader: ClipReader
) -> ClipPreview:
    """Read a clip as in training, and write its frames to `out` as PNG files named by time.

    Raises:
        UserError: The video cannot be read, or `out` cannot be written.
    """
    start = time.perf_counter()
    try:
        clip = reader.clip(video, request, size)
        info = reader.probe(video)
    except VideoError as error:
        raise UserError(str(error)) from error
    seconds = time.perf_counter() - start
    stats = reader.stats()
    reader.close()
    files = _write_frames(clip.frames, out) if out is not None else ()
    return ClipPreview(info, clip.frames, files, stats, seconds)


def _write_frames(frames: tuple[Frame, ...], out: Path) -> tuple[Path, ...]:
    files = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for number, frame in enumerate(frames):
            files.append(out / f"{number:03d}-{frame.pts_s:.3f}s.png")
            files[-1].write_bytes(encode_image(frame.rgb))
    except OSError as error:
        raise UserError(f"cannot write images to {out}: {error.strerror or error}") from error
    return tuple(files)


def print_preview(preview: ClipPreview) -> None:
    """Print the video, a table of the frames, and the summary."""
    info, console = preview.info, Console(highlight=False)
    console.print(f"{info.uri}: {info.width}x{info.height}, {info.duration_s:.2f} s, {info.fps:.2f} fps on average")
    table = Table("frame", "time s", "size", *(["file"] if preview.files else []), box=None)
    for number, frame in enumerate(preview.frames):
        file_cell = [str(preview.files[number])] if preview.files else []
        table.add_row(str(number), f"{frame.pts_s:.3f}", f"{frame.ref.width}x{frame.ref.height}", *file_cell)
    console.print(table)
    console.print(preview.summary)
