"""Validation and opening of video files; no other module opens videos.

A video has a `uri` for users and a local path. For a URL, the path is the downloaded file.

Files are opened with a container allow-list and the `file` protocol only. Otherwise a text file in
ffconcat format could make FFmpeg read other files.
"""

from __future__ import annotations

import functools
import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import av
import blake3
from av.container import InputContainer
from av.stream import Discard, Disposition
from av.video.stream import VideoStream

from vz_ray.utils.errors import UserError
from vz_ray.video.errors import (
    NotAVideoError,
    SourceNotAllowedError,
    UnsupportedCodecError,
    VideoLimitExceededError,
    VideoNotFoundError,
    VideoPermissionError,
)
from vz_ray.video.remote import DownloadCache

ALLOWED_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,flv,mpeg"
ALLOWED_CODECS = frozenset(
    {"h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mpeg1video", "msmpeg4v3", "flv1"}
)
_OPTIONS = {"format_whitelist": ALLOWED_CONTAINERS, "protocol_whitelist": "file"}
_IMAGE_BRANDS = frozenset({"avif", "avis", "heic", "heix", "heim", "heis", "mif1", "msf1"})
_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")

FileKey: TypeAlias = tuple[str, int, int, int, int]
"""`(path, size, mtime_ns, inode, device)`; changes with the file."""


@dataclass(frozen=True, slots=True)
class VideoLimits:
    """Limits checked before decoding.

    Attributes:
        max_pixels: Maximum area of a coded frame, pixels.
    """

    max_duration_s: float = 8 * 3600.0
    max_pixels: int = 8192 * 4608
    max_request_frames: int = 4096


class VideoLocator:
    """Maps a URI to a local path.

    Args:
        downloads: Downloads URLs; None rejects them.
        roots: Allowed directories, after resolving symbolic links; empty allows all.
    """

    def __init__(self, downloads: DownloadCache | None = None, roots: Sequence[Path | str] = ()) -> None:
        self._downloads = downloads
        self._roots = tuple(os.path.realpath(root) for root in roots)

    def locate(self, uri: str) -> str:
        """Return the local path; download a URL first.

        Raises:
            SourceNotAllowedError: The directory or URL is not allowed.
            VideoLimitExceededError: The download is too large.
            DownloadFailedError: The download failed.
        """
        if is_url(uri):
            if self._downloads is None:
                raise SourceNotAllowedError(f"{uri}: URLs are not supported here; download the file and pass its path")
            return str(self._downloads.fetch(uri))
        if self._roots and not any(_inside(uri, root) for root in self._roots):
            raise SourceNotAllowedError(
                f"{uri}: not in an allowed directory ({', '.join(self._roots)}); move the file or extend "
                "clips.allowed_dirs"
            )
        return uri


def is_url(uri: str) -> bool:
    """Return whether `uri` is a URL."""
    return _SCHEME.match(uri) is not None


def require_files(uris: Iterable[str]) -> None:
    """Raise `UserError` for the first path that is not a file; URLs are not checked."""
    for uri in uris:
        if not is_url(uri) and not Path(uri).is_file():
            raise UserError(f"file {uri} does not exist")


def _inside(path: str, root: str) -> bool:
    real = os.path.realpath(path)
    return real == root or real.startswith(root.rstrip("/") + "/")


LOCAL_FILES = VideoLocator()
"""Locator that allows every local file and no URL."""


def file_key(uri: str, path: str | None = None) -> FileKey:
    """Return the key of a file without opening it. `path` defaults to `uri`.

    Raises:
        VideoNotFoundError, VideoPermissionError, SourceNotAllowedError, NotAVideoError: Not a
            regular, non-empty file.
    """
    path = LOCAL_FILES.locate(uri) if path is None else path
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VideoNotFoundError(f"{uri}: no such file; check the path") from error
    except PermissionError as error:
        raise _permission_error(uri) from error
    except (OSError, ValueError) as error:
        raise VideoNotFoundError(f"{uri!r}: invalid path ({error})") from error
    if stat.S_ISDIR(status.st_mode):
        raise NotAVideoError(f"{uri}: a directory; pass the path of a video file", "the video is not a file")
    if not stat.S_ISREG(status.st_mode):
        raise SourceNotAllowedError(f"{uri}: a device, pipe or socket, not a file", "the video is not a file")
    if status.st_size == 0:
        raise NotAVideoError(f"{uri}: an empty file", "the video file is empty")
    return (os.path.abspath(path), status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)


def compute_video_id(uri: str, path: str | None = None) -> str:
    """Return `blake3:<hex>` of the whole file, equal for copies.

    A hash of sampled bytes could give a patched file the cached frames of another. Hashing takes
    about 0.3 s per GB, once per process and file; path, size, modification time and inode identify
    the file afterwards.
    """
    try:
        return hash_file(file_key(uri, path))
    except PermissionError as error:
        raise _permission_error(uri) from error


@functools.lru_cache(maxsize=65_536)
def hash_file(key: FileKey) -> str:
    """Return `blake3:<hex>` of the file, cached by its key."""
    return "blake3:" + blake3.blake3().update_mmap(key[0]).hexdigest()


def open_video(uri: str, limits: VideoLimits, path: str | None = None) -> tuple[InputContainer, VideoStream]:
    """Validate and open a video with one decoder thread. The caller closes the container.

    FFmpeg selects the best stream: marked default, then by number of frames and bit rate. Attached
    pictures such as covers are skipped.

    Raises:
        VideoError: The subclass names the cause.
    """
    file = file_key(uri, path)[0]
    try:
        options = {**_OPTIONS, "max_pixels": _decoder_max_pixels(limits)}
        container = av.open(file, options=options, metadata_errors="replace")
    except (av.error.PermissionError, PermissionError) as error:
        raise _permission_error(uri) from error
    except (av.error.FileNotFoundError, FileNotFoundError) as error:
        raise VideoNotFoundError(f"{uri}: no such file; check the path") from error
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise NotAVideoError(
            f"{uri}: not a video in a known container ({ALLOWED_CONTAINERS}): {error.__class__.__name__}"
        ) from error
    try:
        stream = _select_stream(uri, container, limits)
    except BaseException:
        container.close()
        raise
    return container, stream


def _select_stream(uri: str, container: InputContainer, limits: VideoLimits) -> VideoStream:
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
        raise NotAVideoError(f"{uri}: has no video stream, only {_stream_types(container)}", "the file has no video")
    if container.metadata.get("major_brand", "").strip() in _IMAGE_BRANDS:
        raise NotAVideoError(f"{uri}: a still image, not a video", "the file is an image, not a video")
    codec = stream.codec_context.codec.canonical_name if stream.codec_context else "an unknown codec"
    if codec not in ALLOWED_CODECS:
        raise UnsupportedCodecError(
            f"{uri}: codec {codec} is not supported; convert the video to h264 or one of "
            f"{', '.join(sorted(ALLOWED_CODECS))}"
        )
    if stream.width < 1 or stream.height < 1:
        raise NotAVideoError(f"{uri}: the video stream has no frame size", "the video is damaged")
    check_pixels(uri, stream.width * stream.height, limits)
    check_duration(uri, _declared_duration(container, stream), limits)
    for other in container.streams:
        if other is not stream:
            other.discard = Discard.all
    stream.codec_context.thread_count = 1
    # Coded frames may be larger than the container states, also in mid-file.
    stream.codec_context.options = {"max_pixels": _decoder_max_pixels(limits)}
    return stream


def _decoder_max_pixels(limits: VideoLimits) -> str:
    """Return the decoder's limit, with a margin for sides padded to coding blocks of up to 128 pixels."""
    return str(limits.max_pixels + limits.max_pixels // 8 + 128 * 128)


def check_pixels(uri: str, pixels: int, limits: VideoLimits) -> None:
    """Raise `VideoLimitExceededError` if coded frames are too large."""
    if pixels > limits.max_pixels:
        raise VideoLimitExceededError(
            f"{uri}: frames have {pixels} pixels, above the limit of {limits.max_pixels}; scale the video down",
            "the video's resolution is too high",
        )


def check_duration(uri: str, seconds: float, limits: VideoLimits) -> None:
    """Raise `VideoLimitExceededError` if the video is too long."""
    if seconds > limits.max_duration_s:
        raise VideoLimitExceededError(
            f"{uri}: duration {seconds:.0f} s exceeds the limit of {limits.max_duration_s:g} s; cut the video",
            "the video is too long",
        )


def _declared_duration(container: InputContainer, stream: VideoStream) -> float:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / av.time_base


def _stream_types(container: InputContainer) -> str:
    return ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"


def _permission_error(uri: str) -> VideoPermissionError:
    return VideoPermissionError(f"{uri}: no read permission; check mode and owner")
