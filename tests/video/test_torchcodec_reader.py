"""torchcodec reader: the same frames at the same times, or an error that names the cause."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.video.sample_videos import VideoSpec, read_frames, rotate_video, write_video
from tests.video.test_torchcodec_reference import FILES
from vz_ray.config.clips import ClipsConfig
from vz_ray.decode import DecodePool
from vz_ray.utils.errors import UserError
from vz_ray.video.clip_reader import ClipReader
from vz_ray.video.errors import CorruptVideoError, VideoLimitExceededError
from vz_ray.video.frame import FrameSize, OverviewRequest, ZoomRequest
from vz_ray.video.video_file import VideoLimits
from vz_ray.video.video_reader import VideoReader

SIZE = FrameSize(min_pixels=28 * 28, max_pixels=56 * 56, factor=28)


@pytest.fixture
def needs_torchcodec() -> None:
    try:
        from vz_ray.video import torchcodec_reader

        torchcodec_reader.import_torchcodec()
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("needs_torchcodec")
@pytest.mark.parametrize("spec", FILES, ids=lambda spec: spec.name)
def test_frames_match_the_pyav_reader(spec: VideoSpec, tmp_path: Path) -> None:
    from vz_ray.video.torchcodec_reader import TorchcodecReader

    path = str(write_video(tmp_path, spec))
    rng = np.random.default_rng(0)
    with VideoReader(path) as pyav, TorchcodecReader(path, metadata=pyav.metadata) as torchcodec:
        times = [float(t) for t in rng.uniform(0, pyav.info.duration_s - 1e-3, 60)]
        frame_pairs = zip(read_frames(pyav, times, SIZE), read_frames(torchcodec, times, SIZE), strict=True)
        for expected, frame in frame_pairs:
            assert frame.pts_s == expected.pts_s
            assert frame.rgb.shape == expected.rgb.shape
            assert frame.ref.decoder.startswith("torchcodec-")
            assert (frame.ref.scaler, frame.ref.video_id) == ("torchcodec-resize", expected.ref.video_id)
            assert np.abs(expected.rgb.astype(int) - frame.rgb.astype(int)).mean() < 6


@pytest.mark.usefixtures("needs_torchcodec")
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_metadata_is_applied(degrees: int, tmp_path: Path) -> None:
    from vz_ray.video.torchcodec_reader import TorchcodecReader

    path = str(rotate_video(write_video(tmp_path, VideoSpec("flat.mp4", frames=5)), tmp_path / "rotated.mp4", degrees))
    with VideoReader(path) as pyav, TorchcodecReader(path) as torchcodec:
        expected, rgb = (read_frames(reader, [0.08], SIZE)[0].rgb for reader in (pyav, torchcodec))
    assert rgb.shape == expected.shape
    assert np.abs(expected.astype(int) - rgb.astype(int)).mean() < 6


@pytest.mark.usefixtures("needs_torchcodec")
def test_clip_reader_resolves_torchcodec_references(tmp_path: Path) -> None:
    path = str(write_video(tmp_path, VideoSpec("a.mp4", gop=50)))
    reader = ClipReader(decoder="torchcodec")
    frames = [
        *reader.clip(path, OverviewRequest(fps=1), SIZE).frames,
        *reader.clip(path, ZoomRequest(2, 4, 8), SIZE).frames,
    ]
    reader.close()
    other_reader = ClipReader(decoder="torchcodec")
    resolved = other_reader.resolve([frame.ref for frame in frames])
    assert [frame.ref for frame in resolved] == [frame.ref for frame in frames]
    assert all((a.rgb == b.rgb).all() for a, b in zip(resolved, frames, strict=True))
    assert not frames[0].rgb.flags.writeable
    other_reader.close()


@pytest.mark.usefixtures("needs_torchcodec")
def test_unreadable_file_error_suggests_pyav(tmp_path: Path) -> None:
    path = str(write_video(tmp_path, VideoSpec("a.avi")))
    reader = ClipReader(decoder="torchcodec")
    with pytest.raises(
        CorruptVideoError, match=r"a\.avi: torchcodec cannot read the video .* set clips\.decoder to pyav"
    ):
        reader.clip(path, OverviewRequest(fps=1), SIZE)
    reader.close()
    limited = ClipReader(decoder="torchcodec", limits=VideoLimits(max_request_frames=4))
    with pytest.raises(VideoLimitExceededError, match="frames exceeds the limit of 4"):
        limited.clip(str(write_video(tmp_path, VideoSpec("a.mp4"))), OverviewRequest(fps=1), SIZE)
    limited.close()


def test_missing_torchcodec_error_suggests_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(UserError, match="cannot be loaded"):
        DecodePool.start(ClipsConfig(decoder="torchcodec"))
    with pytest.raises(UserError, match=r"clips\.decoder is torchcodec, which cannot be loaded .* install vz_ray"):
        ClipReader(decoder="torchcodec")
