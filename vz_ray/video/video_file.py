"""The only place that opens a video, and what it refuses to open.

A video has a `uri`, by which everyone names it, and a path on this machine,
which is the same or, for a URL, the file that it was fetched to.

A file is opened with a container allow-list and the `file` protocol alone:
without them a text file in ffconcat format, whatever its name, would make
FFmpeg read other files.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import av
import blake3
from av.container import InputContainer
from av.stream import Discard, Disposition
from av.video.stream import VideoStream

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
"""`(path, size, mtime_ns, inode, device)`: changes whenever the file does."""


@dataclass(frozen=True, slots=True)
class VideoLimits:
    """What is refused before any of it is decoded.

    Attributes:
        max_duration_s: Longest video.
        max_pixels: Largest frame, as coded.
        max_request_frames: Most frames in one request.
    """

    max_duration_s: float = 8 * 3600.0
    max_pixels: int = 8192 * 4608
    max_request_frames: int = 4096


class VideoLocator:
    """Where the file of a `uri` is on this machine.

    Args:
        downloads: Fetches URLs; none refuses them.
        roots: The only directories that files may be in, links followed; empty allows all.
    """

    def __init__(self, downloads: DownloadCache | None = None, roots: Sequence[Path | str] = ()) -> None:
        self._downloads = downloads
        self._roots = tuple(os.path.realpath(root) for root in roots)

    def locate(self, uri: str) -> str:
        """A path that can be opened now.

        Raises:
            SourceRefused, OverLimit, DownloadFailed: It may not be opened, or cannot be fetched.
        """
        if _SCHEME.match(uri):
            if self._downloads is None:
                raise SourceNotAllowedError(
                    f"{uri}: only files can be opened here; download it and give its path",
                    "the video's address cannot be opened",
                )
            return str(self._downloads.fetch(uri))
        if self._roots and not any(_inside(uri, root) for root in self._roots):
            raise SourceNotAllowedError(
                f"{uri}: not in one of the directories that videos may be in, {', '.join(self._roots)} "
                "(clips.allowed_dirs)",
                "the video's address cannot be opened",
            )
        return uri


def is_url(uri: str) -> bool:
    """Whether it names something to be fetched."""
    return _SCHEME.match(uri) is not None


def _inside(path: str, root: str) -> bool:
    real = os.path.realpath(path)
    return real == root or real.startswith(root.rstrip("/") + "/")


LOCAL_FILES = VideoLocator()
"""Files of this machine, all of them."""


def file_key(uri: str, path: str | None = None) -> FileKey:
    """Looks at the file without opening it; `path` where it is not `uri` itself.

    Raises:
        VideoMissing, VideoDenied, SourceRefused, NotAVideo: It is not a regular, non-empty file.
    """
    path = LOCAL_FILES.locate(uri) if path is None else path
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VideoNotFoundError(f"{uri}: no such file; check the path", "the video is missing") from error
    except PermissionError as error:
        raise _denied(uri) from error
    except (OSError, ValueError) as error:
        raise VideoNotFoundError(f"{uri!r}: not a usable path ({error})", "the video is missing") from error
    if stat.S_ISDIR(status.st_mode):
        raise NotAVideoError(f"{uri}: a directory; give a video file inside it", "the video is not a file")
    if not stat.S_ISREG(status.st_mode):
        raise SourceNotAllowedError(f"{uri}: a device, pipe or socket, not a file", "the video is not a file")
    if status.st_size == 0:
        raise NotAVideoError(f"{uri}: an empty file", "the video file is empty")
    return (os.path.abspath(path), status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)


class _VideoIdCache:
    """Content identity by file, so that a file is hashed once per process."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._known: OrderedDict[FileKey, str] = OrderedDict()

    def get(self, uri: str, path: str | None) -> str:
        key = file_key(uri, path)
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        try:
            digest = "blake3:" + blake3.blake3().update_mmap(key[0]).hexdigest()
        except PermissionError as error:
            raise _denied(uri) from error
        with self._lock:
            self._known[key] = digest
            while len(self._known) > self._most:
                self._known.popitem(last=False)
        return digest


_identities = _VideoIdCache(most=65_536)


def compute_video_id(uri: str, path: str | None = None) -> str:
    """`blake3:<hex>` of the whole file, the same for every copy of it.

    The whole file, since a sample of its bytes would give a re-muxed or
    patched file the identity, and so the cached frames, of another. It costs
    about a third of a second per GB, once per process: afterwards the path,
    size, modification time and inode stand for it.
    """
    return _identities.get(uri, path)


def open_video(uri: str, limits: VideoLimits, path: str | None = None) -> tuple[InputContainer, VideoStream]:
    """Opens a checked video with one decoder thread; the caller must close the container.

    The stream is the one FFmpeg calls best (marked default, then most frames
    and highest bit rate); covers and other attached pictures do not count.

    Raises:
        VideoError: A subclass that says why it was refused.
    """
    file = file_key(uri, path)[0]
    try:
        options = {**_OPTIONS, "max_pixels": _most_coded(limits)}
        container = av.open(file, options=options, metadata_errors="replace")
    except (av.error.PermissionError, PermissionError) as error:
        raise _denied(uri) from error
    except (av.error.FileNotFoundError, FileNotFoundError) as error:
        raise VideoNotFoundError(f"{uri}: no such file; check the path", "the video is missing") from error
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise NotAVideoError(
            f"{uri}: not a video in a known container ({ALLOWED_CONTAINERS}): {error.__class__.__name__}",
            "the file is not a video that can be read",
        ) from error
    try:
        stream = _checked_stream(uri, container, limits)
    except BaseException:
        container.close()
        raise
    return container, stream


def _checked_stream(uri: str, container: InputContainer, limits: VideoLimits) -> VideoStream:
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
        raise NotAVideoError(f"{uri}: has no video stream, only {_kinds(container)}", "the file has no video")
    if container.metadata.get("major_brand", "").strip() in _IMAGE_BRANDS:
        raise NotAVideoError(f"{uri}: a still image, not a video", "the file is an image, not a video")
    codec = stream.codec_context.codec.canonical_name if stream.codec_context else "an unknown codec"
    if codec not in ALLOWED_CODECS:
        raise UnsupportedCodecError(
            f"{uri}: codec {codec} is not among {', '.join(sorted(ALLOWED_CODECS))}; convert it to h264",
            "the video's codec is not supported",
        )
    if stream.width < 1 or stream.height < 1:
        raise NotAVideoError(f"{uri}: its video stream states no frame size", "the video is damaged")
    check_pixels(uri, stream.width * stream.height, limits)
    check_duration(uri, _declared_duration(container, stream), limits)
    for other in container.streams:
        if other is not stream:
            other.discard = Discard.all
    stream.codec_context.thread_count = 1
    # Frames within may be larger than the container says, or become so midway.
    stream.codec_context.options = {"max_pixels": _most_coded(limits)}
    return stream


def _most_coded(limits: VideoLimits) -> str:
    """The limit as the decoder is told it, with room for sides that are coded in blocks of up to 128."""
    return str(limits.max_pixels + limits.max_pixels // 8 + 128 * 128)


def check_pixels(uri: str, pixels: int, limits: VideoLimits) -> None:
    """Raises `VideoLimitExceededError` for coded frames larger than the limit."""
    if pixels > limits.max_pixels:
        raise VideoLimitExceededError(
            f"{uri}: frames of {pixels} pixels exceed the limit of {limits.max_pixels}; scale it down",
            "the video's resolution is too high",
        )


def check_duration(uri: str, seconds: float, limits: VideoLimits) -> None:
    """Raises `VideoLimitExceededError` for a video longer than the limit."""
    if seconds > limits.max_duration_s:
        raise VideoLimitExceededError(
            f"{uri}: {seconds:.0f} s long, over the limit of {limits.max_duration_s:g} s; cut it",
            "the video is too long",
        )


def _declared_duration(container: InputContainer, stream: VideoStream) -> float:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / av.time_base


def _kinds(container: InputContainer) -> str:
    return ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"


def _denied(uri: str) -> VideoPermissionError:
    return VideoPermissionError(
        f"{uri}: no permission to read it; check its mode and owner", "the video is locked"
    )
