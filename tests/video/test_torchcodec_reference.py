"""PyAV reader compared with torchcodec in exact mode; skipped if torchcodec cannot be loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.video.sample_videos import VideoSpec, read_frames, write_video
from vz_ray.video.frame import FrameSize
from vz_ray.video.video_reader import VideoReader

FULL = FrameSize(min_pixels=96 * 64, max_pixels=96 * 64, factor=32)
"""Size of the files, so frames are not scaled."""

FILES = [
    VideoSpec("long_gop.mp4"),
    VideoSpec("open_gop.mkv", gop=30, options={"x264-params": "open-gop=1:scenecut=0"}),
    VideoSpec("uneven.mp4", rate=90, uneven=True, gop=40),
    VideoSpec("late_start.mp4", start=60, gop=50),
    VideoSpec("x265.mp4", codec="libx265", gop=48, options={"x265-params": "log-level=none:pools=none"}),
    VideoSpec("vp9.webm", codec="libvpx-vp9", gop=60, b_frames=0, frames=120, options={"cpu-used": "8"}),
]


@pytest.fixture(scope="module")
def decoder_class() -> Any:
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"torchcodec cannot be loaded: {str(error).splitlines()[0]}")
    return VideoDecoder


@pytest.mark.parametrize("spec", FILES, ids=lambda spec: spec.name)
def test_times_and_pixels_match_torchcodec(spec: VideoSpec, tmp_path: Path, decoder_class: Any) -> None:
    path = write_video(tmp_path, spec)
    torchcodec = decoder_class(str(path), dimension_order="NHWC", seek_mode="exact")
    begin_s = torchcodec.metadata.begin_stream_seconds
    rng = np.random.default_rng(0)
    with VideoReader(str(path)) as reader:
        times = rng.uniform(0, reader.info.duration_s - 1e-3, 60)
        frames = read_frames(reader, [float(t) for t in times], FULL)
        batch = torchcodec.get_frames_played_at([float(t) + begin_s for t in times])
    assert [f.pts_s for f in frames] == pytest.approx([p - begin_s for p in batch.pts_seconds.tolist()], abs=1e-6)
    for frame, rgb in zip(frames, batch.data.numpy(), strict=True):
        # Chroma upsampling differs; a neighboring frame would differ far more.
        assert np.abs(frame.rgb.astype(int) - rgb.astype(int)).mean() < 6
