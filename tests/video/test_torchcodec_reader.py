"""torchcodec behind the same interface: the same frames at the same times, or an error that says why not."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.video.sample_videos import VideoSpec, rotate_video, write_video
from tests.video.test_torchcodec_reference import FILES
from vz_ray.config.clips import ClipsConfig
from vz_ray.decode import DecodePool
from vz_ray.utils.errors import UserError
from vz_ray.video.clip_reader import ClipReader
from vz_ray.video.errors import CorruptVideoError, VideoLimitExceededError
from vz_ray.video.frame import FrameSize, OverviewRequest, ZoomRequest
from vz_ray.video.video_file import VideoLimits
from vz_ray.video.video_reader import VideoReader

SIZE = FrameSize(min_pixels=28 * 28, max_pixels=56 * 56)


@pytest.fixture
def needs_torchcodec() -> None:
    try:
        from vz_ray.video import torchcodec_reader

        torchcodec_reader.import_torchcodec()
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("needs_torchcodec")
@pytest.mark.parametrize("made", FILES, ids=lambda made: made.name)
def test_it_gives_the_frames_that_the_other_decoder_gives(made: VideoSpec, tmp_path: Path) -> None:
    from vz_ray.video.torchcodec_reader import TorchcodecReader

    path = str(write_video(tmp_path, made))
    draw = np.random.default_rng(0)
    with VideoReader(path) as known, TorchcodecReader(path, metadata=known.metadata) as other:
        times = [float(t) for t in draw.uniform(0, known.info.duration_s - 1e-3, 60)]
        for ours, theirs in zip(known.read_frames(times, SIZE), other.read_frames(times, SIZE), strict=True):
            assert theirs.pts_s == ours.pts_s
            assert theirs.rgb.shape == ours.rgb.shape
            assert theirs.ref.decoder.startswith("torchcodec-")
            assert (theirs.ref.scaler, theirs.ref.video_id) == ("torchcodec-resize", ours.ref.video_id)
            assert np.abs(ours.rgb.astype(int) - theirs.rgb.astype(int)).mean() < 6


@pytest.mark.usefixtures("needs_torchcodec")
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_it_turns_what_is_to_be_turned(degrees: int, tmp_path: Path) -> None:
    from vz_ray.video.torchcodec_reader import TorchcodecReader

    path = str(
        rotate_video(write_video(tmp_path, VideoSpec("flat.mp4", frames=5)), tmp_path / "turned.mp4", degrees)
    )
    with VideoReader(path) as known, TorchcodecReader(path) as other:
        ours, theirs = (reader.read_frames([0.08], SIZE)[0].rgb for reader in (known, other))
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs.astype(int)).mean() < 6


@pytest.mark.usefixtures("needs_torchcodec")
def test_a_clip_reader_with_it_resolves_its_own_references(tmp_path: Path) -> None:
    path = str(write_video(tmp_path, VideoSpec("a.mp4", gop=50)))
    reader = ClipReader(decoder="torchcodec")
    frames = [
        *reader.overview(path, OverviewRequest(fps=1), SIZE).frames,
        *reader.zoom(path, ZoomRequest(2, 4, 8), SIZE).frames,
    ]
    reader.close()
    fresh = ClipReader(decoder="torchcodec")
    again = fresh.resolve([frame.ref for frame in frames])
    assert [frame.ref for frame in again] == [frame.ref for frame in frames]
    assert all((a.rgb == b.rgb).all() for a, b in zip(again, frames, strict=True))
    assert not frames[0].rgb.flags.writeable
    fresh.close()


@pytest.mark.usefixtures("needs_torchcodec")
def test_what_it_cannot_read_as_asked_is_an_error_that_names_the_other_decoder(tmp_path: Path) -> None:
    path = str(write_video(tmp_path, VideoSpec("a.avi")))
    reader = ClipReader(decoder="torchcodec")
    with pytest.raises(
        CorruptVideoError, match=r"a\.avi: torchcodec cannot read it .* set clips\.decoder to pyav"
    ):
        reader.overview(path, OverviewRequest(fps=1), SIZE)
    reader.close()
    limited = ClipReader(decoder="torchcodec", limits=VideoLimits(max_request_frames=4))
    with pytest.raises(VideoLimitExceededError, match="frames asked for at once, over 4"):
        limited.overview(str(write_video(tmp_path, VideoSpec("a.mp4"))), OverviewRequest(fps=1), SIZE)
    limited.close()


def test_where_it_is_missing_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(UserError, match="cannot be loaded"):
        DecodePool.start(ClipsConfig(decoder="torchcodec"))
    with pytest.raises(
        UserError, match=r"clips\.decoder is torchcodec, which cannot be loaded .* install vz_ray"
    ):
        ClipReader(decoder="torchcodec")
