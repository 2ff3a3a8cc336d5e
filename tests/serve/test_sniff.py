"""Files by their first bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.video.making import Made, make
from vz_ray.serve.sniff import HEAD, KINDS, of_suffix, sniff
from vz_ray.video.image import encode_image
from vz_ray.video.image_files import is_image


@pytest.mark.parametrize(
    ("made", "suffix"),
    [
        (Made("a.mp4", frames=5), ".mp4"),
        (Made("a.mov", frames=5), ".mp4"),
        (Made("a.mkv", frames=5), ".mkv"),
        (Made("a.webm", "libvpx", frames=5, b_frames=0), ".webm"),
        (Made("a.avi", "mpeg4", frames=5, b_frames=0), ".avi"),
        (Made("a.ts", frames=5), ".ts"),
        (Made("a.m2ts", frames=5), ".ts"),
        (Made("a.mpg", "mpeg2video", frames=5), ".mpg"),
        (Made("a.flv", frames=5), ".flv"),
        (Made("a.3gp", frames=5), ".mp4"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_what_encoders_write_is_known(tmp_path, made, suffix):
    kind = sniff(make(tmp_path, made).read_bytes()[:HEAD])
    assert kind is not None
    assert (kind.suffix, kind.medium) == (suffix, "video")


def test_images_are_known_and_their_names_say_so_to_the_decoders():
    pixels = np.zeros((28, 28, 3), np.uint8)
    assert [sniff(encode_image(pixels, kind)).suffix for kind in ("png", "jpeg")] == [".png", ".jpg"]
    for kind in KINDS:
        assert is_image(f"file{kind.suffix}") == (kind.medium == "image")
        assert of_suffix(kind.suffix) == kind


LISTS = ("#EXTM3U", "ffconcat ", "<?xml", "<MPD", "<svg", "[playlist]", "v=0\r\n", "{", "\ufeff#EX")


@given(st.sampled_from(LISTS), st.text())
def test_lists_that_lead_elsewhere_are_never_videos_whatever_follows(start, text):
    assert sniff((f"{start}\n\n\n\n" + text).encode()[:HEAD]) is None


@given(st.binary(max_size=HEAD))
def test_any_beginning_is_looked_at_without_failing(head):
    kind = sniff(head)
    assert kind is None or kind in KINDS
