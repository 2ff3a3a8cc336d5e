"""Decode actors come with the load and go when it is gone, on a real Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import ray

from tests.video.sample_videos import VideoSpec, write_video
from vz_ray.config.clips import ClipsConfig
from vz_ray.decode import DecodePool
from vz_ray.video.frame import FrameSize, ZoomRequest

SIZE = FrameSize(min_pixels=28 * 28, max_pixels=112 * 112)

pytestmark = pytest.mark.usefixtures("ray_session")


async def until(true: Callable[[], bool], work: Callable[[], Awaitable[None]], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        await work()


@pytest.mark.parametrize("keeper_dies", [False, True])
async def test_actors_come_with_the_load_and_go_when_it_is_gone(tmp_path: Path, keeper_dies: bool) -> None:
    videos = [str(write_video(tmp_path, VideoSpec(f"{name}.mp4", gop=100))) for name in "abcd"]
    config = ClipsConfig(
        num_actors=1,
        max_actors=3,
        cpus_per_actor=0,
        memory_cache_mib=0,
        disk_cache_gib=0,
        upscale_queue_length=2,
        upscale_delay_s=0.5,
        downscale_delay_s=1.0,
    )
    pool = DecodePool.start(config)
    number = 0

    async def work() -> None:
        """Sixty clips, each of which must come."""
        nonlocal number
        number += 1
        asked = (
            pool.zoom(videos[n % 4], ZoomRequest(n % 10 + number / 1000, n % 10 + 2, fps=12), SIZE)
            for n in range(60)
        )
        assert {len(clip.frames) > 10 for clip in await asyncio.gather(*asked)} == {True}

    try:
        await pool.wait_until_ready()
        await until(lambda: len(pool._router.actors) == 3, work)
        grown = dict(pool._router.actors)
        if keeper_dies:
            ray.kill(pool._autoscaler, no_restart=False)
            # Those that it had started have ended with it: requests go on, and new ones are started.
            await until(lambda: len(pool._router.actors) == 1, work)
            await until(lambda: len(pool._router.actors) == 3, work)
        assert (await pool.stats()).num_decoders == 3

        async def rest() -> None:
            await asyncio.sleep(0.5)
            assert (await pool.zoom(videos[0], ZoomRequest(1, 2, fps=12), SIZE)).frames

        await until(lambda: len(pool._router.actors) == 1, rest)
        assert pool._router.actors[0] == grown[0]
        assert (await pool.stats()).quarantined == {}
    finally:
        pool.close()
