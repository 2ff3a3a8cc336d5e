"""Frames from image files."""

from __future__ import annotations

import numpy as np
import pytest

from vz_ray.video.clip_reader import ClipReader
from vz_ray.video.errors import FrameMismatch, NotAVideo, SourceRefused, VideoMissing
from vz_ray.video.frame import FrameSize, Overview, VideoError, Zoom
from vz_ray.video.image import encode_image
from vz_ray.video.image_files import is_image, read_again, read_image
from vz_ray.video.source import Sources

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
    again = read_again(frame.ref)
    np.testing.assert_array_equal(again.rgb, frame.rgb)
    assert again.ref == frame.ref


def test_a_resized_image_is_the_same_again(tmp_path):
    (tmp_path / "b.jpg").write_bytes(encode_image(picture(640, 360), "jpeg"))
    frame = read_image(str(tmp_path / "b.jpg"), ANY)
    np.testing.assert_array_equal(read_again(frame.ref).rgb, frame.rgb)


def test_whoever_reads_videos_reads_images_too(path, tmp_path):
    (tmp_path / "b.JPG").write_bytes(encode_image(picture(640, 360), "jpeg"))
    reader = ClipReader()
    refs = []
    for name in ("a.png", "b.JPG"):
        uri = str(tmp_path / name)
        (frame,) = reader.overview(uri, Overview(1, 1), ANY).frames
        assert frame.ref == read_image(uri, ANY).ref
        refs.append(frame.ref)
    found = reader.resolve([*refs, refs[0]])
    assert [frame.ref for frame in found] == [*refs, refs[0]]
    np.testing.assert_array_equal(found[0].rgb, picture(56, 28))


def test_an_image_is_as_bound_to_its_folders_as_a_video(path, tmp_path):
    with pytest.raises(SourceRefused, match=r"clips\.roots"):
        ClipReader(sources=Sources(None, [str(tmp_path / "elsewhere")])).overview(path, Overview(1, 1), ANY)


def test_images_are_told_by_the_ending_of_their_names():
    assert all(map(is_image, ("a.png", "/x/b.JPEG", "https://host/c.webp?size=9")))
    assert not any(map(is_image, ("a.mp4", "png", "a.png.mp4")))


def test_a_changed_image_is_not_taken_for_the_one_referenced(path, tmp_path):
    frame = read_image(path, ANY)
    (tmp_path / "a.png").write_bytes(encode_image(picture(56, 28, seed=1)))
    with pytest.raises(FrameMismatch):
        read_again(frame.ref)


@pytest.mark.parametrize("content", [b"", b"not an image", encode_image(picture(56, 28))[:60]])
def test_what_is_no_image_is_named(tmp_path, content):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"bad\.png"):
        read_image(str(path), ANY)


def test_a_missing_one_is_named(tmp_path):
    with pytest.raises(VideoMissing, match="gone"):
        read_image(str(tmp_path / "gone.png"), ANY)


def test_an_image_has_no_time(path):
    reader = ClipReader()
    with pytest.raises(NotAVideo, match="an image has no duration"):
        reader.zoom(path, Zoom(0, 1, 1), ANY)
    with pytest.raises(NotAVideo, match="an image has no duration"):
        reader.probe(path)
