"""Local frame source and clip reader: caching, references, timeouts."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.video.sample_videos import VideoSpec, write_video
from vz_ray.utils.timeouts import StepTimeout
from vz_ray.video.clip_reader import ClipReader
from vz_ray.video.errors import FrameMismatchError, InvalidFrameRequestError
from vz_ray.video.frame import FrameSize, OverviewRequest, ZoomRequest
from vz_ray.video.local_source import LocalFrameSource

SIZE = FrameSize(min_pixels=28 * 28, max_pixels=56 * 56, factor=28)


@pytest.fixture
def video(tmp_path: Path) -> str:
    return str(write_video(tmp_path, VideoSpec("video.mp4", gop=100)))


async def test_references_of_a_zoom_reproduce_the_bytes(video: str) -> None:
    with LocalFrameSource() as frames:
        info = await frames.probe(video)
        clip = await frames.clip(video, ZoomRequest(2, 4, fps=4), SIZE)
    assert [frame.pts_s for frame in clip.frames] == pytest.approx([2.0, 2.24, 2.48, 2.72, 3.0, 3.24, 3.48, 3.72])
    assert {ref.video_id for ref in clip.refs} == {info.video_id}
    with LocalFrameSource() as other_source:
        resolved = await other_source.resolve(clip.refs[::-1])
    assert [frame.ref for frame in resolved] == list(clip.refs[::-1])
    assert all(np.array_equal(a.rgb, b.rgb) for a, b in zip(resolved[::-1], clip.frames, strict=True))


async def test_repeated_request_hits_the_cache(video: str) -> None:
    with LocalFrameSource() as frames:
        first = await frames.clip(video, OverviewRequest(fps=1), SIZE)
        before = await frames.stats()
        second = await frames.clip(video, OverviewRequest(fps=1), SIZE)
        resolved = await frames.resolve(first.refs)
        after = await frames.stats()
    count = len(first.frames)
    assert all(a is b for a, b in zip(first.frames, second.frames, strict=True))
    assert [frame.ref for frame in resolved] == list(first.refs)
    assert (before.misses, before.hits) == (count, 0)
    assert (after.misses, after.hits) == (count, 2 * count)
    assert after.decoded_frames == before.decoded_frames


async def test_size_is_part_of_the_cache_make_key(video: str) -> None:
    with LocalFrameSource() as frames:
        small = await frames.clip(video, ZoomRequest(2, 3, fps=1), SIZE)
        large = await frames.clip(video, ZoomRequest(2, 3, fps=1), FrameSize(25_088, 100_352, 28))
    assert small.frames[0].rgb.shape != large.frames[0].rgb.shape
    assert small.frames[0].pts_s == large.frames[0].pts_s


async def test_reference_to_changed_file_is_rejected(video: str, tmp_path: Path) -> None:
    with LocalFrameSource() as frames:
        clip = await frames.clip(video, ZoomRequest(2, 4, fps=2), SIZE)
        write_video(tmp_path, VideoSpec("video.mp4", gop=50, frames=300))
        assert (await frames.probe(video)).duration_s == pytest.approx(12.0)
        with pytest.raises(FrameMismatchError, match="the file has changed"):
            await frames.resolve(clip.refs)


async def test_reference_with_other_digest_is_rejected(video: str) -> None:
    with LocalFrameSource() as frames:
        clip = await frames.clip(video, ZoomRequest(2, 3, fps=1), SIZE)
        with pytest.raises(FrameMismatchError, match="decodes to other pixels"):
            await frames.resolve([replace(clip.refs[0], digest="00")])


async def test_cached_frame_of_a_copy_has_the_requested_uri(video: str, tmp_path: Path) -> None:
    copy = shutil.copy(video, tmp_path / "copy.mp4")
    with LocalFrameSource() as frames:
        await frames.clip(video, ZoomRequest(2, 3, fps=1), SIZE)
        clip = await frames.clip(str(copy), ZoomRequest(2, 3, fps=1), SIZE)
        assert (await frames.stats()).hits == 1
    assert clip.refs[0].uri == str(copy)


async def test_zoom_outside_the_video_is_rejected(video: str) -> None:
    with (
        LocalFrameSource() as frames,
        pytest.raises(InvalidFrameRequestError, match=r"outside the video \(12\.80 s\)"),
    ):
        await frames.clip(video, ZoomRequest(50, 52, fps=2), SIZE)


async def test_timeout_names_the_request(video: str) -> None:
    with (
        LocalFrameSource(timeout_s=1e-6) as frames,
        pytest.raises(StepTimeout, match=r"overview of .*video\.mp4"),
    ):
        await frames.clip(video, OverviewRequest(), SIZE)


async def test_concurrent_requests_are_all_served(video: str) -> None:
    with LocalFrameSource() as frames:
        requests = [frames.clip(video, ZoomRequest(k, k + 1, fps=4), SIZE) for k in range(10)]
        clips = await asyncio.gather(*requests)
    assert [clip.request.start_s for clip in clips if isinstance(clip.request, ZoomRequest)] == list(range(10))
    assert all(len(clip.frames) == 4 for clip in clips)


def test_number_of_open_videos_is_limited(tmp_path: Path) -> None:
    uris = [str(write_video(tmp_path, VideoSpec(f"{n}.mp4", frames=n))) for n in (10, 11, 12)]
    reader = ClipReader(max_open_videos=2)
    for uri in [*uris, *uris]:
        reader.clip(uri, OverviewRequest(), SIZE)
    stats = reader.stats()
    assert len(reader._open) == 2
    assert (stats.scanned_videos, stats.misses, stats.hits) == (6, 3, 3)
    reader.close()
    assert not reader._open
    assert reader.stats().decoded_frames == stats.decoded_frames
