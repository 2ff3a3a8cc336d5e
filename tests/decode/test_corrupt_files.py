"""Hundreds of damaged files at the pool: typed errors or frames, and everybody else is served as before."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest

from tests.video.sample_videos import VideoSpec, write_video
from vz_ray.config.clips import ClipsConfig
from vz_ray.decode import DecodePool
from vz_ray.video.frame import Clip, FrameSize, OverviewRequest, VideoError, ZoomRequest

SIZE = FrameSize(min_pixels=28 * 28, max_pixels=56 * 56)
EACH = 32
CONTAINERS = [
    VideoSpec("a.mp4", frames=100),
    VideoSpec("b.mkv", frames=100, gop=25),
    VideoSpec("c.webm", codec="libvpx", frames=60, b_frames=0, gop=30, options={"cpu-used": "8"}),
    VideoSpec("d.ts", frames=100, gop=25),
    VideoSpec("e.avi", codec="mpeg4", frames=100, gop=25),
    VideoSpec("f.flv", frames=100, gop=25),
    VideoSpec("g.mpg", codec="mpeg2video", frames=100, gop=15),
    VideoSpec("h.mp4", codec="libx265", frames=60, options={"x265-params": "log-level=none:pools=none"}),
]


def damaged(content: bytes, draw: random.Random, number: int) -> bytes:
    """Cut off, bits flipped, a stretch overwritten, or a stretch taken out."""
    match number % 4:
        case 0:
            return content[: draw.randrange(1, len(content))]
        case 1:
            changed = bytearray(content)
            for _ in range(draw.choice([1, 4, 32])):
                changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
            return bytes(changed)
        case 2:
            start = draw.randrange(len(content))
            noise = draw.randbytes(draw.randrange(1, 2000))
            return content[:start] + noise[: len(content) - start] + content[start + len(noise) :]
        case _:
            start = draw.randrange(len(content))
            return content[:start] + content[start + draw.randrange(1, 2000) :]


@pytest.mark.usefixtures("ray_session")
async def test_damaged_files_give_typed_errors_and_harm_nobody(tmp_path: Path) -> None:
    draw = random.Random(0)
    good, mutants = [], []
    for made in CONTAINERS:
        path = write_video(tmp_path, made)
        good.append(str(path))
        for number in range(EACH):
            mutant = tmp_path / f"{path.stem}-{number}{path.suffix}"
            mutant.write_bytes(damaged(path.read_bytes(), draw, number))
            mutants.append(str(mutant))
    pool = DecodePool.start(
        ClipsConfig(num_actors=2, cpus_per_actor=0, disk_cache_gib=1, disk_cache_dir=str(tmp_path / "cache"))
    )
    try:
        await pool.wait_until_ready()
        before = await asyncio.gather(*(pool.overview(uri, OverviewRequest(fps=4), SIZE) for uri in good))

        told: list[tuple[str, str, str]] = []

        async def ask(uri: str) -> list[str]:
            found = []
            for asked in (
                pool.overview(uri, OverviewRequest(fps=4), SIZE),
                pool.zoom(uri, ZoomRequest(1, 2, fps=8), SIZE),
            ):
                try:
                    clip: Clip = await asked
                    assert all(frame.rgb.shape[2] == 3 for frame in clip.frames)
                    found.append("frames")
                except VideoError as error:
                    told.append((uri, str(error), error.model_message))
                    found.append(type(error).__name__)
            return found

        answers = await asyncio.gather(*(ask(uri) for uri in mutants))
        assert all(uri in person and uri not in model for uri, person, model in told)
        seen = Counter(answer for both in answers for answer in both)
        stats = await pool.stats()
        assert (stats.lost, stats.timed_out, stats.killed, stats.unresponsive) == (0, 0, 0, ())
        assert seen["frames"] > len(mutants)
        assert not seen["UnexpectedReadError"]
        assert seen["NotAVideo"] + seen["VideoDamaged"] > 10
        after = await asyncio.gather(*(pool.overview(uri, OverviewRequest(fps=3), SIZE) for uri in good))
        again = await asyncio.gather(*(pool.overview(uri, OverviewRequest(fps=4), SIZE) for uri in good))
        assert [clip.refs for clip in again] == [clip.refs for clip in before]
        assert all(clip.frames for clip in after)
    finally:
        pool.close()
