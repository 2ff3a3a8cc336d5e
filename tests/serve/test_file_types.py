"""Detection of file types from the first bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.video.sample_videos import VideoSpec, write_video
from vz_ray.serve.file_types import FILE_TYPES, HEADER_BYTES, detect_file_type, file_type_of_suffix
from vz_ray.video.image_encoding import encode_image
from vz_ray.video.image_reader import is_image


@pytest.mark.parametrize(
    ("spec", "suffix"),
    [
        (VideoSpec("a.mp4", frames=5), ".mp4"),
        (VideoSpec("a.mov", frames=5), ".mp4"),
        (VideoSpec("a.mkv", frames=5), ".mkv"),
        (VideoSpec("a.webm", "libvpx", frames=5, b_frames=0), ".webm"),
        (VideoSpec("a.avi", "mpeg4", frames=5, b_frames=0), ".avi"),
        (VideoSpec("a.ts", frames=5), ".ts"),
        (VideoSpec("a.m2ts", frames=5), ".ts"),
        (VideoSpec("a.mpg", "mpeg2video", frames=5), ".mpg"),
        (VideoSpec("a.flv", frames=5), ".flv"),
        (VideoSpec("a.3gp", frames=5), ".mp4"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_encoder_outputs_are_detected(tmp_path, spec, suffix):
    kind = detect_file_type(write_video(tmp_path, spec).read_bytes()[:HEADER_BYTES])
    assert kind is not None
    assert (kind.suffix, kind.modality) == (suffix, "video")


def test_images_are_detected():
    pixels = np.zeros((28, 28, 3), np.uint8)
    assert [detect_file_type(encode_image(pixels, kind)).suffix for kind in ("png", "jpeg")] == [
        ".png",
        ".jpg",
    ]
    for kind in FILE_TYPES:
        assert is_image(f"file{kind.suffix}") == (kind.modality == "image")
        assert file_type_of_suffix(kind.suffix) == kind


LISTS = ("#EXTM3U", "ffconcat ", "<?xml", "<MPD", "<svg", "[playlist]", "v=0\r\n", "{", "\ufeff#EX")


@given(st.sampled_from(LISTS), st.text())
def test_playlists_are_never_videos(start, text):
    assert detect_file_type((f"{start}\n\n\n\n" + text).encode()[:HEADER_BYTES]) is None


@given(st.binary(max_size=HEADER_BYTES))
def test_any_bytes_are_accepted(head):
    kind = detect_file_type(head)
    assert kind is None or kind in FILE_TYPES
