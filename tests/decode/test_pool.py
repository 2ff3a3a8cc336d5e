"""Decode pool on a real Ray instance: coalescing, retries, restarts, quarantine."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import ray
from ray.exceptions import RayActorError

from tests.video.sample_videos import VideoSpec, write_video
from vz_ray.config.clips import ClipsConfig
from vz_ray.decode import DecodePool
from vz_ray.decode.admission import request_owner
from vz_ray.utils.timeouts import StepTimeout
from vz_ray.video.errors import (
    DecoderDiedError,
    FrameMismatchError,
    UnexpectedReadError,
    VideoNotFoundError,
    VideoQuarantinedError,
)
from vz_ray.video.frame import FrameSize, OverviewRequest, ZoomRequest
from vz_ray.video.local_source import LocalFrameSource

SIZE = FrameSize(min_pixels=28 * 28, max_pixels=56 * 56, factor=28)


pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("videos")
    return [str(write_video(folder, VideoSpec(f"{name}.mp4", gop=100, start=i))) for i, name in enumerate("abcdefgh")]


@pytest.fixture
def pool(request: pytest.FixtureRequest) -> Iterator[DecodePool]:
    config = replace(
        ClipsConfig(num_actors=2, cpus_per_actor=0, memory_cache_mib=64, disk_cache_gib=0),
        **getattr(request, "param", {}),
    )
    pool = DecodePool.start(config)
    asyncio.run(pool.wait_until_ready())
    yield pool
    pool.close()


def send_signal(actor: object, number: signal.Signals) -> int:
    """Send a signal to the actor's process and return its pid."""
    pid = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))  # type: ignore[attr-defined]
    os.kill(pid, number)
    return int(pid)


async def test_clips_equal_those_of_a_local_reader(pool: DecodePool, videos: list[str]) -> None:
    with LocalFrameSource() as local:
        for uri in videos[:4]:
            assert await pool.probe(uri) == await local.probe(uri)
            for request in (OverviewRequest(fps=1.0), OverviewRequest(fps=2.0, max_frames=5)):
                pool_clip, local_clip = await asyncio.gather(
                    pool.clip(uri, request, SIZE), local.clip(uri, request, SIZE)
                )
                assert pool_clip.refs == local_clip.refs
            pool_clip = await pool.clip(uri, ZoomRequest(3, 5, fps=4), SIZE)
            local_clip = await local.clip(uri, ZoomRequest(3, 5, fps=4), SIZE)
            assert pool_clip.request == local_clip.request
            for pool_frame, local_frame in zip(pool_clip.frames, local_clip.frames, strict=True):
                assert pool_frame.ref == local_frame.ref
                assert np.array_equal(pool_frame.rgb, local_frame.rgb)


async def test_resolve_keeps_order_across_videos(pool: DecodePool, videos: list[str]) -> None:
    clips = await asyncio.gather(*(pool.clip(uri, ZoomRequest(1, 3, fps=4), SIZE) for uri in videos))
    refs = [ref for row in zip(*(clip.refs for clip in clips), strict=True) for ref in row]
    frames = await pool.resolve(refs)
    assert [frame.ref for frame in frames] == refs
    changed = replace(refs[0], digest="0" * 64)
    with pytest.raises(FrameMismatchError, match="differs from its reference"):
        await pool.resolve([*refs, changed])


async def test_identical_requests_are_coalesced(pool: DecodePool, videos: list[str]) -> None:
    requests = [pool.clip(videos[0], OverviewRequest(fps=1.0), SIZE) for _ in range(8)]
    clips = await asyncio.gather(*requests)
    reader = (await pool.stats()).reader
    num_frames = len(clips[0].frames)
    assert len({clip.refs for clip in clips}) == 1
    assert (reader.requests, reader.misses, reader.scanned_videos) == (1, num_frames, 1)
    repeated = await pool.clip(videos[0], OverviewRequest(fps=1.0), SIZE)
    assert repeated.refs == clips[0].refs
    assert (await pool.stats()).reader.hits == num_frames


async def test_cancelled_caller_does_not_cancel_shared_request(pool: DecodePool, videos: list[str]) -> None:
    request = ZoomRequest(1, 3, fps=4)
    cancelled, waiting = (asyncio.create_task(pool.clip(videos[1], request, SIZE)) for _ in range(2))
    await asyncio.sleep(0)
    cancelled.cancel()
    assert len((await waiting).frames) == 8
    assert cancelled.cancelled()
    only_caller = asyncio.create_task(pool.clip(videos[1], ZoomRequest(4, 6, fps=4), SIZE))
    await asyncio.sleep(0.01)
    only_caller.cancel()
    await asyncio.gather(only_caller, return_exceptions=True)
    await asyncio.sleep(0)
    assert pool._current_loop_state().limiter.reserved_bytes == 0


@pytest.mark.parametrize("pool", [{"max_in_flight_mib": 1, "memory_cache_mib": 0}], indirect=True)
async def test_all_owners_are_served_under_the_byte_limit(pool: DecodePool, videos: list[str]) -> None:
    waits: list[float] = []

    async def episode(number: int) -> None:
        with request_owner(f"episode {number}"):
            for turn in range(3):
                sent = time.monotonic()
                start = (number % 10) + turn / 10
                clip = await pool.clip(videos[number % 8], ZoomRequest(start, start + 1, fps=8), SIZE)
                waits.append(time.monotonic() - sent)
                assert len(clip.frames) == 8

    await asyncio.gather(*(episode(number) for number in range(64)))
    stats = await pool.stats()
    assert len(waits) == 192
    assert pool._current_loop_state().limiter.reserved_bytes == 0
    assert 2**19 < stats.peak_in_flight_bytes <= 2**20


@pytest.mark.parametrize("pool", [{"max_attempts": 1, "quarantine_after": 2}], indirect=True)
async def test_video_that_kills_decoders_is_quarantined(pool: DecodePool, videos: list[str]) -> None:
    async def kill_decoder(uri: str) -> None:
        owner = pool._router.route(uri, set())
        await pool._retry.wait_for_restart(owner, "the next request")
        pid = send_signal(pool._router.actors[owner], signal.SIGSTOP)
        pending = asyncio.create_task(pool.clip(uri, ZoomRequest(1, 3, fps=4), SIZE))
        await asyncio.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(DecoderDiedError):
            await pending
        await pool._retry.wait_for_restart(owner, "the next request")

    await kill_decoder(videos[1])
    # A success resets the count of failures.
    assert len((await pool.clip(videos[1], ZoomRequest(1, 3, fps=4), SIZE)).frames) == 8
    await kill_decoder(videos[0])
    await kill_decoder(videos[1])
    await kill_decoder(videos[0])
    with pytest.raises(
        VideoQuarantinedError, match=r"a\.mp4 is quarantined: decoder died during zoom .* 2 consecutive"
    ):
        await pool.clip(videos[0], ZoomRequest(1, 3, fps=4), SIZE)
    assert len((await pool.clip(videos[1], ZoomRequest(1, 3, fps=4), SIZE)).frames) == 8
    assert list(pool._retry.quarantine.reasons) == [videos[0]]


async def test_client_works_inside_another_actor(pool: DecodePool, videos: list[str]) -> None:
    @ray.remote(num_cpus=0)
    class Caller:
        async def read_pts(self, client: DecodePool, uri: str) -> list[float]:
            clip = await client.clip(uri, ZoomRequest(2, 4, fps=2), SIZE)
            return [frame.pts_s for frame in clip.frames]

    caller = Caller.remote()
    assert await caller.read_pts.remote(pool, videos[1]) == pytest.approx([2.0, 2.48, 3.0, 3.48])


async def test_video_error_keeps_type_and_model_message(pool: DecodePool) -> None:
    with pytest.raises(VideoNotFoundError, match=r"nowhere\.mp4: no such file") as raised:
        await pool.probe("nowhere.mp4")
    assert type(raised.value) is VideoNotFoundError
    assert raised.value.model_message == "the video is missing"


async def test_unhandled_exception_becomes_video_error(pool: DecodePool, videos: list[str]) -> None:
    with pytest.raises(UnexpectedReadError, match=r"a\.mp4: reading failed with ZeroDivisionError"):
        await pool.clip(videos[0], OverviewRequest(fps=1), FrameSize(25_088, 100_352, factor=0))
    assert len((await pool.clip(videos[0], OverviewRequest(fps=1), SIZE)).frames) == 13


async def test_request_is_retried_after_decoder_death(pool: DecodePool, videos: list[str]) -> None:
    owner = pool._router.route(videos[0], set())
    pid = send_signal(pool._router.actors[owner], signal.SIGSTOP)
    pending = asyncio.create_task(pool.clip(videos[0], ZoomRequest(1, 3, fps=4), SIZE))
    await asyncio.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    clip = await pending
    assert len(clip.frames) == 8
    stats = pool.client_stats()
    assert (stats.lost, stats.retried, stats.killed) == (1, 1, 0)
    await pool._retry.wait_for_restart(owner, "the next request")
    assert len((await pool.clip(videos[0], OverviewRequest(fps=1), SIZE)).frames) == 13
    assert (await pool.stats()).unresponsive == ()


@pytest.mark.parametrize("pool", [{"max_attempts": 1}], indirect=True)
async def test_death_at_last_attempt_names_decoder_and_attempt(pool: DecodePool, videos: list[str]) -> None:
    owner = pool._router.route(videos[0], set())
    pid = send_signal(pool._router.actors[owner], signal.SIGSTOP)
    pending = asyncio.create_task(pool.probe(videos[0]))
    await asyncio.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(DecoderDiedError, match=rf"decoder-{owner} died during probe of .*, attempt 1 of 1"):
        await pending


@pytest.mark.parametrize("pool", [{"timeout_s": 2.0, "max_attempts": 1}], indirect=True)
async def test_hung_decoder_is_named_killed_and_restarted(pool: DecodePool, videos: list[str]) -> None:
    owner = pool._router.route(videos[0], set())
    pid = send_signal(pool._router.actors[owner], signal.SIGSTOP)
    with pytest.raises(StepTimeout, match=rf"decoder-{owner} did not finish zoom of .*a\.mp4 \[1, 3\]"):
        await pool.clip(videos[0], ZoomRequest(1, 3, fps=4), SIZE)
    assert pool.client_stats().killed == 1
    assert await wait_for_new_pid(pool, owner, pid) != pid
    assert len((await pool.clip(videos[0], ZoomRequest(1, 3, fps=4), SIZE)).frames) == 8


async def wait_for_new_pid(pool: DecodePool, slot: int, old_pid: int) -> int:
    """Return the decoder's pid after Ray has restarted it."""
    for _ in range(60):
        try:
            call = pool._router.actors[slot].__ray_call__.remote(lambda _: os.getpid())
            if (pid := int(await asyncio.wait_for(call, 10))) != old_pid:
                return pid
        except (RayActorError, TimeoutError):
            pass
        await asyncio.sleep(0.5)
    raise AssertionError(f"decoder-{slot} was not restarted")


@pytest.mark.parametrize("pool", [{"timeout_s": 2.0}], indirect=True)
async def test_request_to_hung_decoder_is_retried_on_another(pool: DecodePool, videos: list[str]) -> None:
    owner = pool._router.route(videos[0], set())
    send_signal(pool._router.actors[owner], signal.SIGSTOP)
    clip = await pool.clip(videos[0], ZoomRequest(1, 3, fps=4), SIZE)
    assert len(clip.frames) == 8
    stats = pool.client_stats()
    assert (stats.timed_out, stats.retried, stats.killed) == (1, 1, 1)


@pytest.mark.parametrize("pool", [{"max_load_imbalance": 2}], indirect=True)
async def test_route_uses_least_loaded_decoder_at_max_imbalance(pool: DecodePool, videos: list[str]) -> None:
    owner = pool._router.route(videos[0], set())
    assert [pool._router.route(videos[0], set()) for _ in range(3)] == [owner] * 3
    pool._router.in_flight[owner] = 1
    assert pool._router.route(videos[0], set()) == owner
    pool._router.in_flight[owner] = 2
    assert pool._router.route(videos[0], set()) == 1 - owner
    pool._router.in_flight[owner] = 0


@pytest.mark.parametrize("pool", [{"num_actors": 1}], indirect=True)
async def test_single_decoder_is_awaited_after_its_death(pool: DecodePool, videos: list[str]) -> None:
    send_signal(pool._router.actors[0], signal.SIGKILL)
    assert len((await pool.clip(videos[2], ZoomRequest(1, 3, fps=4), SIZE)).frames) == 8


@pytest.mark.parametrize("pool", [{"num_actors": 1, "max_rss_mib": 1}], indirect=True)
async def test_decoder_above_memory_limit_restarts_without_loss(pool: DecodePool, videos: list[str]) -> None:
    pid = ray.get(pool._router.actors[0].__ray_call__.remote(lambda _: os.getpid()))
    assert len((await pool.clip(videos[0], ZoomRequest(1, 3, fps=4), SIZE)).frames) == 8
    assert await wait_for_new_pid(pool, 0, pid) != pid
    for start in range(3):
        assert len((await pool.clip(videos[0], ZoomRequest(start, start + 2, fps=4), SIZE)).frames) == 8
    assert pool.client_stats().quarantined == 0


async def test_frames_are_read_only_views(pool: DecodePool, videos: list[str]) -> None:
    frame = (await pool.clip(videos[3], OverviewRequest(fps=1), SIZE)).frames[0]
    with pytest.raises(ValueError, match="read-only"):
        frame.rgb[0, 0, 0] = 1


@pytest.mark.parametrize(("key", "value"), [("num_actors", 0), ("max_download_gib", 0.0), ("cpus_per_actor", -1.0)])
def test_invalid_setting_is_named(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{key} is {value}"):
        ClipsConfig(**{key: value})  # type: ignore[arg-type]
