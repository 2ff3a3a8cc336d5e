"""Clip preview of a real file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families.checkpoint_files import QWEN3_VL_PROCESSOR, write_checkpoint
from tests.video.sample_videos import VideoSpec, write_video
from vz_ray.config.clips import ClipsConfig
from vz_ray.decode.clip_preview import preview_clip, preview_size
from vz_ray.decode.reader_factory import build_reader
from vz_ray.utils.errors import UserError
from vz_ray.video.frame import FrameSize, ZoomRequest


def test_preview_writes_images_and_reuses_the_disk_cache(tmp_path: Path) -> None:
    video = str(write_video(tmp_path, VideoSpec("v.mp4")))
    config, out = ClipsConfig(disk_cache_gib=1, disk_cache_dir=str(tmp_path / "cache")), tmp_path / "frames"
    first = preview_clip(video, ZoomRequest(1, 3, fps=2), FrameSize(25_088, 100_352, 28), out, build_reader(config))
    repeated = preview_clip(video, ZoomRequest(1, 3, fps=2), FrameSize(25_088, 100_352, 28), None, build_reader(config))
    assert [path.name for path in first.files] == [
        "000-1.000s.png",
        "001-1.480s.png",
        "002-2.000s.png",
        "003-2.480s.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in first.files)
    assert first.summary.startswith("scanned, 4 frames: 0 from the cache, 4 decoded")
    assert repeated.summary.startswith("4 frames: 4 from the cache, 0 decoded")
    assert repeated.files == ()
    with pytest.raises(UserError, match="ends before it starts"):
        preview_clip(video, ZoomRequest(3, 1, fps=2), FrameSize(25_088, 100_352, 28), None, build_reader(config))


def test_preview_uses_the_grid_of_a_checkpoint(tmp_path: Path) -> None:
    qwen3_vl = write_checkpoint(tmp_path / "qwen3-vl", "qwen3_vl", QWEN3_VL_PROCESSOR)
    assert preview_size(qwen3_vl, 131_072) == FrameSize(65_536, 131_072, 32)
    assert preview_size(None, 100_352) == FrameSize(25_088, 100_352, 28)
    assert preview_size(None, 784) == FrameSize(784, 784, 28)
    with pytest.raises(UserError, match=r"Qwen3-VL: --max-pixels is 784; .* supports 65536 to 16777216"):
        preview_size(qwen3_vl, 784)
