"""Question images, stored as videos of one frame.

As videos they take the same path to the model as other frames: through the decode
pool, with a frame reference that reproduces the same bytes.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import av
import blake3
from av.video.reformatter import ColorRange

from vz_ray.utils.errors import UserError
from vz_ray.video.disk_cache import resolve_cache_dir


def image_cache_dir(configured: str) -> Path:
    """Return the configured folder; by default a folder in the user's cache directory."""
    return Path(configured) if configured else resolve_cache_dir("") / "question_images"


def image_to_video(image: bytes, folder: Path, location: str) -> str:
    """Store an encoded image (PNG, JPEG, ...) as a one-frame video and return its path.

    The file name is the content hash, so each image is encoded once. The video is lossless x264 without
    chroma subsampling.

    Raises:
        UserError: The image cannot be decoded; the message starts with `location`.
    """
    path = folder / f"{blake3.blake3(image).hexdigest()[:32]}.mp4"
    if path.is_file():
        return str(path)
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.mp4")
    try:
        with av.open(io.BytesIO(image), "r") as container:
            frame = next(container.decode(video=0))
        _write(frame, partial)
        partial.replace(path)
    except (av.FFmpegError, StopIteration, IndexError) as error:
        raise UserError(f"{location}: the image cannot be decoded ({error})") from error
    finally:
        partial.unlink(missing_ok=True)
    return str(path)


def _write(frame: av.VideoFrame, path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1, options={"qp": "0", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "yuv444p"
        # Without an explicit range, full-range images would be decoded as limited range.
        stream.codec_context.color_range = ColorRange.MPEG
        yuv_frame = frame.reformat(format="yuv444p", dst_color_range=ColorRange.MPEG)
        yuv_frame.pts = 0
        container.mux(stream.encode(yuv_frame))
        container.mux(stream.encode(None))
