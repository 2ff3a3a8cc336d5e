"""The exact reader against torchcodec's exact mode, where that is installed and loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.video.sample_videos import VideoSpec, write_video
from vz_ray.video.frame import FrameSize
from vz_ray.video.video_reader import VideoReader

FULL = FrameSize(min_pixels=96 * 64, max_pixels=96 * 64, factor=32)
"""The size of the files themselves: nothing is scaled."""

FILES = [
    VideoSpec("long_gop.mp4"),
    VideoSpec("open_gop.mkv", gop=30, options={"x264-params": "open-gop=1:scenecut=0"}),
    VideoSpec("uneven.mp4", rate=90, uneven=True, gop=40),
    VideoSpec("late_start.mp4", start=60, gop=50),
    VideoSpec("x265.mp4", codec="libx265", gop=48, options={"x265-params": "log-level=none:pools=none"}),
    VideoSpec("vp9.webm", codec="libvpx-vp9", gop=60, b_frames=0, frames=120, options={"cpu-used": "8"}),
]


@pytest.fixture(scope="module")
def decoder_of() -> Any:
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"torchcodec cannot be used: {str(error).splitlines()[0]}")
    return VideoDecoder


@pytest.mark.parametrize("made", FILES, ids=lambda made: made.name)
def test_times_and_pictures_are_those_of_torchcodec(made: VideoSpec, tmp_path: Path, decoder_of: Any) -> None:
    path = write_video(tmp_path, made)
    theirs = decoder_of(str(path), dimension_order="NHWC", seek_mode="exact")
    begin = theirs.metadata.begin_stream_seconds
    draw = np.random.default_rng(0)
    with VideoReader(str(path)) as reader:
        times = draw.uniform(0, reader.info.duration_s - 1e-3, 60)
        frames = reader.read_frames([float(t) for t in times], FULL)
        batch = theirs.get_frames_played_at([float(t) + begin for t in times])
    assert [f.pts_s for f in frames] == pytest.approx(
        [p - begin for p in batch.pts_seconds.tolist()], abs=1e-6
    )
    for ours, other in zip(frames, batch.data.numpy(), strict=True):
        # Chroma is scaled up in another way: a frame that is off by one differs by far more.
        assert np.abs(ours.rgb.astype(int) - other.astype(int)).mean() < 6
