"""Frames from image files."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib

import av
import numpy as np
import pytest

from vz_ray.video.clip_reader import ClipReader
from vz_ray.video.errors import FrameMismatchError, NotAVideoError, SourceNotAllowedError, VideoNotFoundError
from vz_ray.video.frame import FrameSize, ImageRequest, OverviewRequest, VideoError, ZoomRequest
from vz_ray.video.image_encoding import encode_image
from vz_ray.video.image_reader import is_image, read_image, reread_image
from vz_ray.video.video_file import VideoLocator

ANY = FrameSize(min_pixels=784, max_pixels=100_352)


def picture(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "a.png").write_bytes(encode_image(picture(56, 28)))
    return str(tmp_path / "a.png")


def test_a_png_of_the_right_size_comes_back_bit_for_bit(path):
    frame = read_image(path, ANY)
    np.testing.assert_array_equal(frame.rgb, picture(56, 28))
    assert (frame.ref.width, frame.ref.height, frame.pts_s) == (56, 28, 0.0)


@pytest.mark.parametrize(("kind", "size"), [("png", (640, 360)), ("jpeg", (640, 360)), ("png", (20, 20))])
def test_other_sizes_are_made_the_model_s(tmp_path, kind, size):
    (tmp_path / "b").write_bytes(encode_image(picture(*size), kind))
    frame = read_image(str(tmp_path / "b"), ANY)
    assert frame.rgb.shape[0] % 28 == frame.rgb.shape[1] % 28 == 0
    assert frame.rgb.size // 3 <= 100_352
    assert frame.rgb.shape == (frame.ref.height, frame.ref.width, 3)


def test_references_give_the_same_bytes_again(path):
    frame = read_image(path, ANY)
    again = reread_image(frame.ref)
    np.testing.assert_array_equal(again.rgb, frame.rgb)
    assert again.ref == frame.ref


def test_a_resized_image_is_the_same_again(tmp_path):
    (tmp_path / "b.jpg").write_bytes(encode_image(picture(640, 360), "jpeg"))
    frame = read_image(str(tmp_path / "b.jpg"), ANY)
    np.testing.assert_array_equal(reread_image(frame.ref).rgb, frame.rgb)


def test_whoever_reads_videos_reads_images_too(path, tmp_path):
    (tmp_path / "b.JPG").write_bytes(encode_image(picture(640, 360), "jpeg"))
    reader = ClipReader()
    refs = []
    for name in ("a.png", "b.JPG"):
        uri = str(tmp_path / name)
        (frame,) = reader.overview(uri, OverviewRequest(1, 1), ANY).frames
        assert frame.ref == read_image(uri, ANY).ref
        refs.append(frame.ref)
    found = reader.resolve([*refs, refs[0]])
    assert [frame.ref for frame in found] == [*refs, refs[0]]
    np.testing.assert_array_equal(found[0].rgb, picture(56, 28))


def test_an_image_is_as_bound_to_its_folders_as_a_video(path, tmp_path):
    with pytest.raises(SourceNotAllowedError, match=r"clips\.roots"):
        ClipReader(locator=VideoLocator(None, [str(tmp_path / "elsewhere")])).overview(
            path, OverviewRequest(1, 1), ANY
        )


def test_images_are_told_by_the_ending_of_their_names():
    assert all(map(is_image, ("a.png", "/x/b.JPEG", "https://host/c.webp?size=9")))
    assert not any(map(is_image, ("a.mp4", "png", "a.png.mp4")))


def test_a_changed_image_is_not_taken_for_the_one_referenced(path, tmp_path):
    frame = read_image(path, ANY)
    (tmp_path / "a.png").write_bytes(encode_image(picture(56, 28, seed=1)))
    with pytest.raises(FrameMismatchError):
        reread_image(frame.ref)


@pytest.mark.parametrize("content", [b"", b"not an image", encode_image(picture(56, 28))[:60]])
def test_what_is_no_image_is_named(tmp_path, content):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"bad\.png"):
        read_image(str(path), ANY)


def bomb(kind):
    """A few hundred bytes that say they are 15,000 x 15,000 pixels, less than FFmpeg itself refuses."""
    side = 15_000
    if kind == "png":
        parts = (
            (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)),
            (b"IDAT", zlib.compress(bytes(999))),
        )
        chunks = (struct.pack(">I", len(b)) + t + b + struct.pack(">I", zlib.crc32(t + b)) for t, b in parts)
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    if kind == "jpeg":
        plain = bytearray(encode_image(picture(64, 64), "jpeg"))
        place = plain.index(b"\xff\xc0") + 5
        plain[place : place + 4] = struct.pack(">HH", side, side)
        return bytes(plain)
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 154, 0, 0, 54) + header + bytes(100)


READ_IN_LITTLE_MEMORY = """
import sys
from vz_ray.video.errors import OverLimit
from vz_ray.video.frame import FrameSize
from vz_ray.video.image_reader import read_image

def megabytes(line):
    (found,) = [row for row in open("/proc/self/status") if row.startswith(line)]
    return int(found.split()[1]) // 1024

read_image(sys.argv[1], FrameSize())
before = megabytes("VmPeak")
try:
    read_image(sys.argv[2], FrameSize())
except OverLimit:
    print(megabytes("VmPeak") - before)
"""


@pytest.mark.parametrize("kind", ["png", "jpeg", "bmp"])
def test_an_image_of_too_many_pixels_is_refused_before_there_is_room_for_them(kind, path, tmp_path):
    (tmp_path / "bomb.png").write_bytes(bomb(kind))
    command = [sys.executable, "-c", READ_IN_LITTLE_MEMORY, path, str(tmp_path / "bomb.png")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(found.stdout) < 300  # of 675 MB


LISTS = {
    "ffconcat": b"ffconcat version 1.0\nfile '%s'\n",
    "m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n%s\n#EXT-X-ENDLIST\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="%s"/></svg>',
}


@pytest.mark.parametrize("kind", LISTS)
def test_what_lists_other_files_is_no_image_and_they_are_not_opened(kind, path, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # whoever opened it would wait for ever
    (tmp_path / "list.png").write_bytes(LISTS[kind] % b"pipe")
    with pytest.raises(NotAVideoError):
        read_image(str(tmp_path / "list.png"), ANY)


def test_a_name_is_not_a_pattern_for_other_files(path, tmp_path):
    (tmp_path / "a1.png").write_bytes(encode_image(picture(56, 28, seed=1)))
    (tmp_path / "a%d.png").write_bytes(encode_image(picture(56, 28, seed=2)))
    np.testing.assert_array_equal(read_image(str(tmp_path / "a%d.png"), ANY).rgb, picture(56, 28, seed=2))


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_half_an_image_is_refused_rather_than_filled_with_grey(kind, tmp_path):
    content = encode_image(picture(640, 360), kind)
    (tmp_path / "half").write_bytes(content[: len(content) // 2])
    with pytest.raises(NotAVideoError, match="cannot be decoded"):
        read_image(str(tmp_path / "half"), ANY)


def test_moving_images_are_no_images(tmp_path):
    with av.open(str(tmp_path / "a.apng"), "w", format="apng") as container:
        stream = container.add_stream("apng", rate=5)
        stream.width, stream.height, stream.pix_fmt = 56, 28, "rgb24"
        for seed in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(56, 28, seed), format="rgb24")))
        container.mux(stream.encode(None))
    with pytest.raises(NotAVideoError):
        read_image(str(tmp_path / "a.apng"), ANY)


def test_an_image_needs_no_ending_where_a_still_is_asked_for(path, tmp_path):
    bare = tmp_path / "bare"
    bare.write_bytes((tmp_path / "a.png").read_bytes())
    reader = ClipReader()
    (frame,) = reader.overview(str(bare), ImageRequest(), ANY).frames
    np.testing.assert_array_equal(frame.rgb, picture(56, 28))
    assert reader.resolve([frame.ref])[0].ref == frame.ref
    with pytest.raises(VideoError):
        reader.overview(str(bare), OverviewRequest(1, 1), ANY)


def test_a_missing_one_is_named(tmp_path):
    with pytest.raises(VideoNotFoundError, match="gone"):
        read_image(str(tmp_path / "gone.png"), ANY)


def test_an_image_has_no_time(path):
    reader = ClipReader()
    with pytest.raises(NotAVideoError, match="an image has no duration"):
        reader.zoom(path, ZoomRequest(0, 1, 1), ANY)
    with pytest.raises(NotAVideoError, match="an image has no duration"):
        reader.probe(path)
