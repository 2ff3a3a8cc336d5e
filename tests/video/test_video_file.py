"""Validation of video files: error classes and messages."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from tests.video.sample_videos import VideoSpec, draw_frame, write_video
from vz_ray.video.errors import (
    NotAVideoError,
    SourceNotAllowedError,
    UnsupportedCodecError,
    VideoError,
    VideoNotFoundError,
    VideoPermissionError,
)
from vz_ray.video.video_file import VideoLimits, compute_video_id, open_video
from vz_ray.video.video_reader import VideoReader


def image_file(folder: Path) -> Path:
    path = folder / "image.mp4"
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(draw_frame(0, 64, 48), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def audio_file(folder: Path, *, cover: bool = False) -> Path:
    path = folder / "sound.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        picture_stream = container.add_stream("mjpeg", rate=1) if cover else None
        if picture_stream is not None:
            picture_stream.width, picture_stream.height, picture_stream.pix_fmt = 64, 48, "yuvj420p"
            picture_stream.disposition = av.stream.Disposition.attached_pic
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
        if picture_stream is not None:
            frame = av.VideoFrame.from_ndarray(draw_frame(0, 64, 48), format="rgb24")
            container.mux(picture_stream.encode(frame))
            container.mux(picture_stream.encode(None))
    return path


def text_file(folder: Path) -> Path:
    path = folder / "notes.mp4"
    path.write_text("not a video at all\n" * 100)
    return path


def ffconcat_file(folder: Path) -> Path:
    """Write a file that refers to another one, which FFmpeg would open if allowed."""
    write_video(folder, VideoSpec("hidden.mp4", frames=10))
    path = folder / "list.mp4"
    path.write_text("ffconcat version 1.0\nfile hidden.mp4\n")
    return path


def playlist(folder: Path) -> Path:
    write_video(folder, VideoSpec("hidden.ts", frames=10))
    path = folder / "list.mp4"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhidden.ts\n#EXT-X-ENDLIST\n")
    return path


def empty_file(folder: Path) -> Path:
    path = folder / "empty.mp4"
    path.touch()
    return path


def named_pipe(folder: Path) -> Path:
    path = folder / "pipe.mp4"
    os.mkfifo(path)
    return path


def unsupported_codec_file(folder: Path) -> Path:
    return write_video(folder, VideoSpec("old.mkv", codec="mjpeg", pix_fmt="yuvj420p", frames=3, b_frames=0))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda folder: folder / "absent.mp4", VideoNotFoundError, "no such file"),
        (lambda folder: folder, NotAVideoError, "a directory"),
        (lambda folder: "https://example.org/a.mp4", SourceNotAllowedError, "URLs are not supported here"),
        (lambda folder: "concat:a.mp4|b.mp4", VideoNotFoundError, "no such file"),
        (image_file, NotAVideoError, "not a video in a known container"),
        (audio_file, NotAVideoError, "has no video stream, only audio"),
        (lambda folder: audio_file(folder, cover=True), NotAVideoError, "has no video stream, only audio"),
        (text_file, NotAVideoError, "not a video in a known container"),
        (ffconcat_file, NotAVideoError, "not a video in a known container"),
        (playlist, NotAVideoError, "not a video in a known container"),
        (empty_file, NotAVideoError, "an empty file"),
        (named_pipe, SourceNotAllowedError, "a device, pipe or socket"),
        (unsupported_codec_file, UnsupportedCodecError, "codec mjpeg is not supported"),
    ],
    ids=[
        "absent", "directory", "url", "protocol", "image", "sound", "cover",
        "text", "ffconcat", "playlist", "empty", "pipe", "codec",
    ],
)  # fmt: skip
def test_invalid_file_raises_the_specific_error(
    build: Callable[[Path], Path | str], error: type[VideoError], message: str, tmp_path: Path
) -> None:
    uri = str(build(tmp_path))
    with pytest.raises(error, match=message) as raised:
        VideoReader(uri)
    assert type(raised.value) is error
    assert uri in str(raised.value)
    assert 0 < len(raised.value.model_message) < 80
    assert "/" not in raised.value.model_message
    unpickled = pickle.loads(pickle.dumps(raised.value))
    assert (type(unpickled), str(unpickled), unpickled.model_message) == (
        error,
        str(raised.value),
        raised.value.model_message,
    )


def test_file_without_read_permission_is_rejected(tmp_path: Path) -> None:
    path = write_video(tmp_path, VideoSpec("video.mp4", frames=5))
    path.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(VideoPermissionError, match="no read permission"):
            VideoReader(str(path))
    finally:
        if root:
            os.seteuid(0)


def test_video_id_depends_on_content_only(tmp_path: Path) -> None:
    path = write_video(tmp_path, VideoSpec("video.mp4", frames=5))
    copy = tmp_path / "copy.mp4"
    shutil.copy(path, copy)
    first = compute_video_id(str(path))
    assert first.startswith("blake3:")
    assert compute_video_id(str(copy)) == first
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(bytes(data))
    assert compute_video_id(str(copy)) != first


def test_decoder_uses_one_thread(tmp_path: Path) -> None:
    container, stream = open_video(str(write_video(tmp_path, VideoSpec("video.mp4", frames=5))), VideoLimits())
    with container:
        assert stream.codec_context.thread_count == 1
