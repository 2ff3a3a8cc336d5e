"""Images that belong to questions, kept as videos of one frame.

So they reach the model as any other frame does: through the clip pool, with a
reference from which the same bytes can be had again.
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
    """Where pictures are kept; empty takes the user's cache directory."""
    return Path(configured) if configured else resolve_cache_dir("") / "pictures"


def image_to_video(image: bytes, folder: Path, place: str) -> str:
    """Path of a one-frame video of an encoded image (PNG, JPEG, ...); made once, named by content.

    Colours are kept without subsampling, at x264's best quality.

    Raises:
        UserError: It is no image; names `place`.
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
        raise UserError(f"{place}: its image cannot be decoded ({error})") from error
    finally:
        partial.unlink(missing_ok=True)
    return str(path)


def _write(frame: av.VideoFrame, path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1, options={"qp": "0", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "yuv444p"
        # Said outright, or a picture of full range would be taken for one of limited range.
        stream.codec_context.color_range = ColorRange.MPEG
        shown = frame.reformat(format="yuv444p", dst_color_range=ColorRange.MPEG)
        shown.pts = 0
        container.mux(stream.encode(shown))
        container.mux(stream.encode(None))
