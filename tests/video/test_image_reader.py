"""Image files as frames."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib

import av
import numpy as np
import pytest

from tests.video.sample_videos import random_image
from vz_ray.video.clip_reader import ClipReader
from vz_ray.video.errors import (
    FrameMismatchError,
    NotAVideoError,
    SourceNotAllowedError,
    VideoError,
    VideoNotFoundError,
)
from vz_ray.video.frame import FrameSize, ImageRequest, OverviewRequest, ZoomRequest
from vz_ray.video.image_encoding import encode_image
from vz_ray.video.image_reader import is_image, read_image
from vz_ray.video.video_file import VideoLocator

SIZE = FrameSize(min_pixels=784, max_pixels=100_352, factor=28)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "a.png").write_bytes(encode_image(random_image(56, 28)))
    return str(tmp_path / "a.png")


def test_png_of_target_size_is_read_losslessly(path):
    frame = read_image(path, SIZE)
    np.testing.assert_array_equal(frame.rgb, random_image(56, 28))
    assert (frame.ref.width, frame.ref.height, frame.pts_s) == (56, 28, 0.0)


@pytest.mark.parametrize(("format", "size"), [("png", (640, 360)), ("jpeg", (640, 360)), ("png", (20, 20))])
def test_other_sizes_are_resized_for_the_model(tmp_path, format, size):
    (tmp_path / "b").write_bytes(encode_image(random_image(*size), format))
    frame = read_image(str(tmp_path / "b"), SIZE)
    assert frame.rgb.shape[0] % 28 == frame.rgb.shape[1] % 28 == 0
    assert frame.rgb.size // 3 <= 100_352
    assert frame.rgb.shape == (frame.ref.height, frame.ref.width, 3)


def test_reference_reproduces_the_bytes(path):
    frame = read_image(path, SIZE)
    (reread,) = ClipReader().resolve([frame.ref])
    np.testing.assert_array_equal(reread.rgb, frame.rgb)
    assert reread.ref == frame.ref


def test_reference_reproduces_a_resized_image(tmp_path):
    (tmp_path / "b.jpg").write_bytes(encode_image(random_image(640, 360), "jpeg"))
    frame = read_image(str(tmp_path / "b.jpg"), SIZE)
    (reread,) = ClipReader().resolve([frame.ref])
    np.testing.assert_array_equal(reread.rgb, frame.rgb)


def test_clip_reader_reads_images(path, tmp_path):
    (tmp_path / "b.JPG").write_bytes(encode_image(random_image(640, 360), "jpeg"))
    reader = ClipReader()
    refs = []
    for name in ("a.png", "b.JPG"):
        uri = str(tmp_path / name)
        (frame,) = reader.clip(uri, OverviewRequest(1, 1), SIZE).frames
        assert frame.ref == read_image(uri, SIZE).ref
        refs.append(frame.ref)
    frames = reader.resolve([*refs, refs[0]])
    assert [frame.ref for frame in frames] == [*refs, refs[0]]
    np.testing.assert_array_equal(frames[0].rgb, random_image(56, 28))


def test_image_outside_allowed_dirs_is_rejected(path, tmp_path):
    with pytest.raises(SourceNotAllowedError, match=r"clips\.allowed_dirs"):
        ClipReader(locator=VideoLocator(None, [str(tmp_path / "elsewhere")])).clip(path, OverviewRequest(1, 1), SIZE)


def test_images_are_detected_by_suffix():
    assert all(map(is_image, ("a.png", "/x/b.JPEG", "https://host/c.webp?size=9")))
    assert not any(map(is_image, ("a.mp4", "png", "a.png.mp4")))


def test_changed_image_does_not_match_its_reference(path, tmp_path):
    frame = read_image(path, SIZE)
    (tmp_path / "a.png").write_bytes(encode_image(random_image(56, 28, seed=1)))
    with pytest.raises(FrameMismatchError):
        ClipReader().resolve([frame.ref])


@pytest.mark.parametrize("content", [b"", b"not an image", encode_image(random_image(56, 28))[:60]])
def test_invalid_image_is_named(tmp_path, content):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"bad\.png"):
        read_image(str(path), SIZE)


def decompression_bomb(format):
    """Return a small file with a header of 15,000 x 15,000 pixels, below FFmpeg's own limit."""
    side = 15_000
    if format == "png":
        chunk_data = (
            (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)),
            (b"IDAT", zlib.compress(bytes(999))),
        )
        chunks = (struct.pack(">I", len(b)) + t + b + struct.pack(">I", zlib.crc32(t + b)) for t, b in chunk_data)
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    if format == "jpeg":
        content = bytearray(encode_image(random_image(64, 64), "jpeg"))
        size_offset = content.index(b"\xff\xc0") + 5
        content[size_offset : size_offset + 4] = struct.pack(">HH", side, side)
        return bytes(content)
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 154, 0, 0, 54) + header + bytes(100)


MEASURE_MEMORY = """
import sys
from vz_ray.video.errors import VideoLimitExceededError
from vz_ray.video.frame import FrameSize
from vz_ray.video.image_reader import read_image

def megabytes(line):
    (row,) = [row for row in open("/proc/self/status") if row.startswith(line)]
    return int(row.split()[1]) // 1024

read_image(sys.argv[1], FrameSize(25_088, 100_352, 28))
before = megabytes("VmPeak")
try:
    read_image(sys.argv[2], FrameSize(25_088, 100_352, 28))
except VideoLimitExceededError:
    print(megabytes("VmPeak") - before)
"""


@pytest.mark.parametrize("format", ["png", "jpeg", "bmp"])
def test_oversized_image_is_rejected_before_allocation(format, path, tmp_path):
    (tmp_path / "bomb.png").write_bytes(decompression_bomb(format))
    command = [sys.executable, "-c", MEASURE_MEMORY, path, str(tmp_path / "bomb.png")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 300  # MB; the image has 675 MB


PLAYLISTS = {
    "ffconcat": b"ffconcat version 1.0\nfile '%s'\n",
    "m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n%s\n#EXT-X-ENDLIST\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="%s"/></svg>',
}


@pytest.mark.parametrize("format", PLAYLISTS)
def test_playlist_is_rejected_without_opening_its_files(format, path, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # opening it would block
    (tmp_path / "list.png").write_bytes(PLAYLISTS[format] % b"pipe")
    with pytest.raises(NotAVideoError):
        read_image(str(tmp_path / "list.png"), SIZE)


def test_file_name_is_not_a_pattern(path, tmp_path):
    (tmp_path / "a1.png").write_bytes(encode_image(random_image(56, 28, seed=1)))
    (tmp_path / "a%d.png").write_bytes(encode_image(random_image(56, 28, seed=2)))
    np.testing.assert_array_equal(read_image(str(tmp_path / "a%d.png"), SIZE).rgb, random_image(56, 28, seed=2))


@pytest.mark.parametrize("format", ["png", "jpeg"])
def test_truncated_image_is_rejected(format, tmp_path):
    content = encode_image(random_image(640, 360), format)
    (tmp_path / "half").write_bytes(content[: len(content) // 2])
    with pytest.raises(NotAVideoError, match="cannot decode the image"):
        read_image(str(tmp_path / "half"), SIZE)


def test_animated_image_is_rejected(tmp_path):
    with av.open(str(tmp_path / "a.apng"), "w", format="apng") as container:
        stream = container.add_stream("apng", rate=5)
        stream.width, stream.height, stream.pix_fmt = 56, 28, "rgb24"
        for seed in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(random_image(56, 28, seed), format="rgb24")))
        container.mux(stream.encode(None))
    with pytest.raises(NotAVideoError):
        read_image(str(tmp_path / "a.apng"), SIZE)


def test_image_request_needs_no_suffix(path, tmp_path):
    file = tmp_path / "without_suffix"
    file.write_bytes((tmp_path / "a.png").read_bytes())
    reader = ClipReader()
    (frame,) = reader.clip(str(file), ImageRequest(), SIZE).frames
    np.testing.assert_array_equal(frame.rgb, random_image(56, 28))
    assert reader.resolve([frame.ref])[0].ref == frame.ref
    with pytest.raises(VideoError):
        reader.clip(str(file), OverviewRequest(1, 1), SIZE)


def test_missing_image_is_named(tmp_path):
    with pytest.raises(VideoNotFoundError, match="gone"):
        read_image(str(tmp_path / "gone.png"), SIZE)


def test_image_has_no_duration(path):
    reader = ClipReader()
    with pytest.raises(NotAVideoError, match="an image, not a video"):
        reader.clip(path, ZoomRequest(0, 1, 1), SIZE)
    with pytest.raises(NotAVideoError, match="an image, not a video"):
        reader.probe(path)
