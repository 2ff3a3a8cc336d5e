"""Hundreds of corrupt files: typed errors or frames, and valid files are read as before."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest

from tests.video.sample_videos import VideoSpec, write_video
from vz_ray.config.clips import ClipsConfig
from vz_ray.decode import DecodePool
from vz_ray.video.errors import VideoError
from vz_ray.video.frame import Clip, FrameSize, OverviewRequest, ZoomRequest

SIZE = FrameSize(min_pixels=28 * 28, max_pixels=56 * 56, factor=28)
MUTANTS_PER_FILE = 32
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


def corrupt(content: bytes, rng: random.Random, number: int) -> bytes:
    """Truncate, flip bits, overwrite a range, or delete a range."""
    match number % 4:
        case 0:
            return content[: rng.randrange(1, len(content))]
        case 1:
            changed = bytearray(content)
            for _ in range(rng.choice([1, 4, 32])):
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            return bytes(changed)
        case 2:
            start = rng.randrange(len(content))
            noise = rng.randbytes(rng.randrange(1, 2000))
            return content[:start] + noise[: len(content) - start] + content[start + len(noise) :]
        case _:
            start = rng.randrange(len(content))
            return content[:start] + content[start + rng.randrange(1, 2000) :]


@pytest.mark.usefixtures("ray_session")
async def test_corrupt_files_raise_typed_errors_only(tmp_path: Path) -> None:
    rng = random.Random(0)
    valid, mutants = [], []
    for spec in CONTAINERS:
        path = write_video(tmp_path, spec)
        valid.append(str(path))
        for number in range(MUTANTS_PER_FILE):
            mutant = tmp_path / f"{path.stem}-{number}{path.suffix}"
            mutant.write_bytes(corrupt(path.read_bytes(), rng, number))
            mutants.append(str(mutant))
    pool = DecodePool.start(
        ClipsConfig(num_actors=2, cpus_per_actor=0, disk_cache_gib=1, disk_cache_dir=str(tmp_path / "cache"))
    )
    try:
        await pool.wait_until_ready()
        before = await asyncio.gather(*(pool.clip(uri, OverviewRequest(fps=4), SIZE) for uri in valid))

        errors: list[tuple[str, VideoError]] = []

        async def read(uri: str) -> list[str]:
            outcomes = []
            for request in (
                pool.clip(uri, OverviewRequest(fps=4), SIZE),
                pool.clip(uri, ZoomRequest(1, 2, fps=8), SIZE),
            ):
                try:
                    clip: Clip = await request
                    assert all(frame.rgb.shape[2] == 3 for frame in clip.frames)
                    outcomes.append("frames")
                except VideoError as error:
                    errors.append((uri, error))
                    outcomes.append(type(error).__name__)
            return outcomes

        results = await asyncio.gather(*(read(uri) for uri in mutants))
        assert all(uri in str(error) and uri not in error.model_message for uri, error in errors)
        outcomes = Counter(outcome for result in results for outcome in result)
        stats = pool.client_stats()
        assert (stats.lost, stats.timed_out, stats.killed) == (0, 0, 0)
        assert (await pool.stats()).unresponsive == ()
        assert outcomes["frames"] > len(mutants)
        assert not outcomes["UnexpectedReadError"]
        assert outcomes["NotAVideoError"] + outcomes["CorruptVideoError"] > 10
        other_clips = await asyncio.gather(*(pool.clip(uri, OverviewRequest(fps=3), SIZE) for uri in valid))
        same_clips = await asyncio.gather(*(pool.clip(uri, OverviewRequest(fps=4), SIZE) for uri in valid))
        assert [clip.refs for clip in same_clips] == [clip.refs for clip in before]
        assert all(clip.frames for clip in other_clips)
    finally:
        pool.close()
