"""Overview frames: keyframes, fixed counts, selected frames."""

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
from vz_ray.video.sampling import snap_to_keyframes, spread_indices

SIZE = FrameSize(784, 784, 28)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write 320 frames at 25 fps with a keyframe every second."""
    spec = VideoSpec("v.mp4", gop=25, options={"sc_threshold": "0"})
    return str(write_video(tmp_path_factory.mktemp("videos"), spec))


def frame_times(video: str, request: OverviewRequest | SelectedFramesRequest) -> list[float]:
    return [frame.pts_s for frame in ClipReader().clip(video, request, SIZE).frames]


@given(st.lists(st.integers(0, 500)), st.sets(st.integers(0, 500), min_size=1))
def test_snapped_keyframes_are_distinct_and_ordered(targets: list[int], keyframes: set[int]) -> None:
    keyframe_pts = np.array(sorted(keyframes), dtype=np.int64)
    snapped = snap_to_keyframes(sorted(targets), keyframe_pts)
    assert set(snapped) <= keyframes
    assert snapped == sorted(set(snapped))
    assert len(snapped) == min(len(set(targets)), len(keyframes))


def test_snap_prefers_nearest_then_earlier_keyframe() -> None:
    keyframes = np.array([0, 10, 20, 30, 40, 50, 60, 70])
    assert snap_to_keyframes([4, 15, 36, 70], keyframes) == [0, 10, 40, 70]
    assert snap_to_keyframes([11, 12, 13], keyframes) == [10, 20, 30]
    assert snap_to_keyframes([61, 68, 69], keyframes) == [50, 60, 70]


def test_keyframe_overview_decodes_fewer_frames(video: str) -> None:
    reader = ClipReader()
    clip = reader.clip(video, OverviewRequest(fps=math.inf, max_frames=5, keyframes=True), SIZE)
    assert [frame.pts_s for frame in clip.frames] == [0.0, 3.0, 5.0, 8.0, 10.0]
    uniform_reader = ClipReader()
    uniform_reader.clip(video, OverviewRequest(fps=math.inf, max_frames=5), SIZE)
    assert reader.stats().decoded_frames < uniform_reader.stats().decoded_frames / 2


def test_video_with_few_keyframes_returns_all_of_them(video: str) -> None:
    assert frame_times(video, OverviewRequest(fps=math.inf, max_frames=64, keyframes=True)) == [
        float(k) for k in range(13)
    ]


def test_unseekable_file_ignores_keyframes(tmp_path: Path) -> None:
    video = str(write_video(tmp_path, VideoSpec("v.avi", codec="mpeg4", frames=50, b_frames=0)))
    request = OverviewRequest(fps=math.inf, max_frames=4, keyframes=True)
    assert frame_times(video, request) == frame_times(video, OverviewRequest(fps=math.inf, max_frames=4))


def test_infinite_fps_returns_max_frames(video: str, tmp_path: Path) -> None:
    assert len(frame_times(video, OverviewRequest(fps=math.inf, max_frames=64))) == 64
    short = str(write_video(tmp_path, VideoSpec("short.mp4", frames=3)))
    assert frame_times(short, OverviewRequest(fps=math.inf, max_frames=64)) == pytest.approx([0.0, 0.04, 0.08])


def test_selected_frames_follow_times_or_indices(video: str) -> None:
    assert frame_times(video, SelectedFramesRequest(times_s=(0.0, 1.03, 1.04, 12.78))) == pytest.approx(
        [0.0, 1.0, 1.04, 12.76]
    )
    assert frame_times(video, SelectedFramesRequest(frame_indices=(0, 26, 319))) == pytest.approx([0.0, 1.04, 12.76])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            SelectedFramesRequest(frame_indices=(0, 320)),
            "selected frame 320 does not exist, the video has 320 frames",
        ),
        (SelectedFramesRequest(times_s=(0.0, 13.0)), "selected time 13.0 s is outside"),
        (SelectedFramesRequest(times_s=(math.nan,)), "selected time nan s is outside"),
        (SelectedFramesRequest(), "no frame selected"),
    ],
)
def test_missing_selected_frame_is_rejected(video: str, request_: SelectedFramesRequest, message: str) -> None:
    with pytest.raises(InvalidFrameRequestError, match=message):
        frame_times(video, request_)


def test_spread_indices_starts_with_the_first() -> None:
    assert spread_indices(3, 8) == [0, 1, 2]
    assert spread_indices(8, 3) == [0, 2, 5]
