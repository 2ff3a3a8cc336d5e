"""Which frames of a file an overview means: keyframes, fixed counts, frames chosen one by one."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.video.sample_videos import VideoSpec, write_video
from vz_ray.video.clip_reader import ClipReader
from vz_ray.video.errors import InvalidFrameRequestError
from vz_ray.video.frame import FrameSize, OverviewRequest, SelectedFramesRequest
from vz_ray.video.overview import snap_to_keyframes, spread_indices

SIZE = FrameSize(784, 784)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    """320 frames at 25 fps, a keyframe every second."""
    made = VideoSpec("v.mp4", gop=25, options={"sc_threshold": "0"})
    return str(write_video(tmp_path_factory.mktemp("videos"), made))


def times(video: str, request: OverviewRequest | SelectedFramesRequest) -> list[float]:
    return [frame.pts_s for frame in ClipReader().overview(video, request, SIZE).frames]


@given(st.lists(st.integers(0, 500)), st.sets(st.integers(0, 500), min_size=1))
def test_snapping_gives_distinct_keys_in_order_as_many_as_there_can_be(
    wanted: list[int], keys: set[int]
) -> None:
    table = np.array(sorted(keys), dtype=np.int64)
    found = snap_to_keyframes(sorted(wanted), table)
    assert set(found) <= keys
    assert found == sorted(set(found))
    assert len(found) == min(len(set(wanted)), len(keys))


def test_a_time_goes_to_the_nearest_key_and_of_two_as_near_to_the_earlier() -> None:
    keys = np.array([0, 10, 20, 30, 40, 50, 60, 70])
    assert snap_to_keyframes([4, 15, 36, 70], keys) == [0, 10, 40, 70]
    assert snap_to_keyframes([11, 12, 13], keys) == [10, 20, 30]
    assert snap_to_keyframes([61, 68, 69], keys) == [50, 60, 70]


def test_keyframes_are_decoded_alone(video: str) -> None:
    reader = ClipReader()
    clip = reader.overview(video, OverviewRequest(fps=math.inf, max_frames=5, keyframes=True), SIZE)
    assert [frame.pts_s for frame in clip.frames] == [0.0, 3.0, 5.0, 8.0, 10.0]
    exact = ClipReader()
    exact.overview(video, OverviewRequest(fps=math.inf, max_frames=5), SIZE)
    assert reader.stats().decoded_frames < exact.stats().decoded_frames / 2


def test_a_video_with_fewer_keyframes_than_asked_for_shows_all_of_them(video: str) -> None:
    assert times(video, OverviewRequest(fps=math.inf, max_frames=64, keyframes=True)) == [
        float(k) for k in range(13)
    ]


def test_a_file_that_cannot_be_sought_keeps_the_times_it_was_asked_for(tmp_path: Path) -> None:
    video = str(write_video(tmp_path, VideoSpec("v.avi", codec="mpeg4", frames=50, b_frames=0)))
    keyed = OverviewRequest(fps=math.inf, max_frames=4, keyframes=True)
    assert times(video, keyed) == times(video, OverviewRequest(fps=math.inf, max_frames=4))


def test_a_fixed_count_is_that_many_however_long_the_video_is(video: str, tmp_path: Path) -> None:
    assert len(times(video, OverviewRequest(fps=math.inf, max_frames=64))) == 64
    short = str(write_video(tmp_path, VideoSpec("short.mp4", frames=3)))
    assert times(short, OverviewRequest(fps=math.inf, max_frames=64)) == pytest.approx([0.0, 0.04, 0.08])


def test_chosen_frames_are_those_of_the_times_or_numbers(video: str) -> None:
    assert times(video, SelectedFramesRequest(times_s=(0.0, 1.03, 1.04, 12.78))) == pytest.approx(
        [0.0, 1.0, 1.04, 12.76]
    )
    assert times(video, SelectedFramesRequest(frame_indices=(0, 26, 319))) == pytest.approx(
        [0.0, 1.04, 12.76]
    )


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            SelectedFramesRequest(frame_indices=(0, 320)),
            "frame 320 was chosen for the overview, and it has 320 frames",
        ),
        (SelectedFramesRequest(times_s=(0.0, 13.0)), "the frame at 13.0 s was chosen"),
        (SelectedFramesRequest(times_s=(math.nan,)), "the frame at nan s was chosen"),
        (SelectedFramesRequest(), "no frame was chosen"),
    ],
)
def test_a_frame_that_is_not_there_is_refused(
    video: str, request_: SelectedFramesRequest, message: str
) -> None:
    with pytest.raises(InvalidFrameRequestError, match=message):
        times(video, request_)


def test_thinning_keeps_the_first_and_spreads_the_rest() -> None:
    assert spread_indices(3, 8) == [0, 1, 2]
    assert spread_indices(8, 3) == [0, 2, 5]
