"""Autoscaler on a real Ray instance: decoders are started under load and stopped afterwards."""

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

SIZE = FrameSize(min_pixels=28 * 28, max_pixels=112 * 112, factor=28)

pytestmark = pytest.mark.usefixtures("ray_session")


async def work_until(
    condition: Callable[[], bool], work: Callable[[], Awaitable[None]], timeout_s: float = 120
) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the condition was not met in time"
        await work()


@pytest.mark.parametrize("autoscaler_dies", [False, True])
async def test_pool_scales_with_load(tmp_path: Path, autoscaler_dies: bool) -> None:
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
    num_rounds = 0

    async def work() -> None:
        """Read sixty distinct clips."""
        nonlocal num_rounds
        num_rounds += 1
        requests = (
            pool.clip(videos[n % 4], ZoomRequest(n % 10 + num_rounds / 1000, n % 10 + 2, fps=12), SIZE)
            for n in range(60)
        )
        assert {len(clip.frames) > 10 for clip in await asyncio.gather(*requests)} == {True}

    try:
        await pool.wait_until_ready()
        await work_until(lambda: len(pool._router.actors) == 3, work)
        scaled_up = dict(pool._router.actors)
        if autoscaler_dies:
            ray.kill(pool._autoscaler, no_restart=False)
            # Its decoders die with it. Requests continue, and new decoders are started.
            await work_until(lambda: len(pool._router.actors) == 1, work)
            await work_until(lambda: len(pool._router.actors) == 3, work)
        assert (await pool.stats()).num_decoders == 3

        async def idle() -> None:
            await asyncio.sleep(0.5)
            assert (await pool.clip(videos[0], ZoomRequest(1, 2, fps=12), SIZE)).frames

        await work_until(lambda: len(pool._router.actors) == 1, idle)
        assert pool._router.actors[0] == scaled_up[0]
        assert pool.client_stats().quarantined == 0
    finally:
        pool.close()
