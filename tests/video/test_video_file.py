"""What is refused, by which error, and what each says."""

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
    VideoNotFoundError,
    VideoPermissionError,
)
from vz_ray.video.frame import VideoError
from vz_ray.video.video_file import VideoLimits, compute_video_id, open_video
from vz_ray.video.video_reader import VideoReader


def image(folder: Path) -> Path:
    path = folder / "image.mp4"
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(draw_frame(0, 64, 48), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def sound(folder: Path, *, cover: bool = False) -> Path:
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


def text(folder: Path) -> Path:
    path = folder / "notes.mp4"
    path.write_text("not a video at all\n" * 100)
    return path


def concat(folder: Path) -> Path:
    """Names another file; FFmpeg would open that one if it were allowed to."""
    write_video(folder, VideoSpec("hidden.mp4", frames=10))
    path = folder / "list.mp4"
    path.write_text("ffconcat version 1.0\nfile hidden.mp4\n")
    return path


def playlist(folder: Path) -> Path:
    write_video(folder, VideoSpec("hidden.ts", frames=10))
    path = folder / "list.mp4"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhidden.ts\n#EXT-X-ENDLIST\n")
    return path


def empty(folder: Path) -> Path:
    path = folder / "empty.mp4"
    path.touch()
    return path


def pipe(folder: Path) -> Path:
    path = folder / "pipe.mp4"
    os.mkfifo(path)
    return path


def other_codec(folder: Path) -> Path:
    return write_video(folder, VideoSpec("old.mkv", codec="mjpeg", pix_fmt="yuvj420p", frames=3, b_frames=0))


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda folder: folder / "absent.mp4", VideoNotFoundError, "no such file"),
        (lambda folder: folder, NotAVideoError, "a directory"),
        (lambda folder: "https://example.org/a.mp4", SourceNotAllowedError, "only files can be opened"),
        (lambda folder: "concat:a.mp4|b.mp4", VideoNotFoundError, "no such file"),
        (image, NotAVideoError, "not a video in a known container"),
        (sound, NotAVideoError, "has no video stream, only audio"),
        (lambda folder: sound(folder, cover=True), NotAVideoError, "has no video stream, only audio"),
        (text, NotAVideoError, "not a video in a known container"),
        (concat, NotAVideoError, "not a video in a known container"),
        (playlist, NotAVideoError, "not a video in a known container"),
        (empty, NotAVideoError, "an empty file"),
        (pipe, SourceNotAllowedError, "a device, pipe or socket"),
        (other_codec, UnsupportedCodecError, "codec mjpeg is not among"),
    ],
    ids=[
        "absent", "directory", "url", "protocol", "image", "sound", "cover",
        "text", "ffconcat", "playlist", "empty", "pipe", "codec",
    ],
)  # fmt: skip
def test_what_is_not_a_video_is_refused_by_name(
    build: Callable[[Path], Path | str], error: type[VideoError], says: str, tmp_path: Path
) -> None:
    uri = str(build(tmp_path))
    with pytest.raises(error, match=says) as caught:
        VideoReader(uri)
    assert type(caught.value) is error
    assert uri in str(caught.value)
    assert 0 < len(caught.value.model_message) < 80
    assert "/" not in caught.value.model_message
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again), again.for_model) == (
        error,
        str(caught.value),
        caught.value.model_message,
    )


def test_a_file_without_permission_is_denied(tmp_path: Path) -> None:
    path = write_video(tmp_path, VideoSpec("video.mp4", frames=5))
    path.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(VideoPermissionError, match="no permission to read it"):
            VideoReader(str(path))
    finally:
        if root:
            os.seteuid(0)


def test_identity_follows_content_not_name(tmp_path: Path) -> None:
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


def test_one_decoding_thread_is_used(tmp_path: Path) -> None:
    container, stream = open_video(
        str(write_video(tmp_path, VideoSpec("video.mp4", frames=5))), VideoLimits()
    )
    with container:
        assert stream.codec_context.thread_count == 1
