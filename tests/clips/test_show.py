"""`vz-ray clip` on a real file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.video.making import Made, make
from vz_ray.clips.opening import open_reader
from vz_ray.clips.show import show_clip
from vz_ray.config.clips import ClipsConfig
from vz_ray.observe.errors import UserError
from vz_ray.video.frame import FrameSize, Zoom


def test_images_are_named_by_their_times_and_the_second_look_decodes_nothing(tmp_path: Path) -> None:
    video = str(make(tmp_path, Made("v.mp4")))
    config, out = ClipsConfig(disk_gb=1, disk_dir=str(tmp_path / "cache")), tmp_path / "frames"
    first = show_clip(video, Zoom(1, 3, fps=2), FrameSize(), out, open_reader(config))
    again = show_clip(video, Zoom(1, 3, fps=2), FrameSize(), None, open_reader(config))
    assert [path.name for path in first.files] == [
        "000-1.000s.png",
        "001-1.480s.png",
        "002-2.000s.png",
        "003-2.480s.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in first.files)
    assert first.plan.startswith("scanned, 4 frames: 0 from the cache, 4 decoded")
    assert again.plan.startswith("4 frames: 4 from the cache, 0 decoded")
    assert again.files == ()
    with pytest.raises(UserError, match="ends before it starts"):
        show_clip(video, Zoom(3, 1, fps=2), FrameSize(), None, open_reader(config))
