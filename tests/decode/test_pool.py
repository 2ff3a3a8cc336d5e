"""The clip pool on a real Ray."""

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

SIZE = FrameSize(min_pixels=28 * 28, max_pixels=56 * 56)


pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("videos")
    return [
        str(write_video(folder, VideoSpec(f"{name}.mp4", gop=100, start=i)))
        for i, name in enumerate("abcdefgh")
    ]


@pytest.fixture
def pool(request: pytest.FixtureRequest) -> Iterator[DecodePool]:
    config = replace(
        ClipsConfig(num_actors=2, cpus_per_actor=0, memory_cache_mib=64, disk_cache_gib=0),
        **getattr(request, "param", {}),
    )
    started = DecodePool.start(config)
    asyncio.run(started.wait_until_ready())
    yield started
    started.close()


def send(actor: object, number: signal.Signals) -> int:
    """Signals the actor's process; Ray itself is the only one to tell its pid."""
    pid = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))  # type: ignore[attr-defined]
    os.kill(pid, number)
    return int(pid)


async def test_the_pool_gives_what_a_reader_in_this_process_gives(
    pool: DecodePool, videos: list[str]
) -> None:
    with LocalFrameSource() as local:
        for uri in videos[:4]:
            assert await pool.probe(uri) == await local.probe(uri)
            for request in (OverviewRequest(fps=1.0), OverviewRequest(fps=2.0, max_frames=5)):
                ours, theirs = await asyncio.gather(
                    pool.overview(uri, request, SIZE), local.overview(uri, request, SIZE)
                )
                assert ours.refs == theirs.refs
            ours = await pool.zoom(uri, ZoomRequest(3, 5, fps=4), SIZE)
            theirs = await local.zoom(uri, ZoomRequest(3, 5, fps=4), SIZE)
            assert ours.request == theirs.request
            for a, b in zip(ours.frames, theirs.frames, strict=True):
                assert a.ref == b.ref
                assert np.array_equal(a.rgb, b.rgb)


async def test_references_of_several_videos_come_back_in_the_order_asked(
    pool: DecodePool, videos: list[str]
) -> None:
    clips = await asyncio.gather(*(pool.zoom(uri, ZoomRequest(1, 3, fps=4), SIZE) for uri in videos))
    refs = [ref for row in zip(*(clip.refs for clip in clips), strict=True) for ref in row]
    frames = await pool.resolve(refs)
    assert [frame.ref for frame in frames] == refs
    wrong = replace(refs[0], digest="0" * 64)
    with pytest.raises(FrameMismatchError, match="is not the one referenced"):
        await pool.resolve([*refs, wrong])


async def test_samples_of_one_task_share_one_decode(pool: DecodePool, videos: list[str]) -> None:
    asked = [pool.overview(videos[0], OverviewRequest(fps=1.0), SIZE) for _ in range(8)]
    clips = await asyncio.gather(*asked)
    read = (await pool.stats()).reader
    frames = len(clips[0].frames)
    assert len({clip.refs for clip in clips}) == 1
    assert (read.requests, read.misses, read.scanned_videos) == (1, frames, 1)
    assert (await pool.stats()).coalesced == 7
    again = await pool.overview(videos[0], OverviewRequest(fps=1.0), SIZE)
    assert again.refs == clips[0].refs
    assert (await pool.stats()).reader.hits == frames


async def test_who_leaves_does_not_take_the_answer_from_the_others(
    pool: DecodePool, videos: list[str]
) -> None:
    look = ZoomRequest(1, 3, fps=4)
    leaving, staying = (asyncio.create_task(pool.zoom(videos[1], look, SIZE)) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    assert len((await staying).frames) == 8
    assert leaving.cancelled()
    alone = asyncio.create_task(pool.zoom(videos[1], ZoomRequest(4, 6, fps=4), SIZE))
    await asyncio.sleep(0.01)
    alone.cancel()
    await asyncio.gather(alone, return_exceptions=True)
    await asyncio.sleep(0)
    assert (await pool.stats()).in_flight_bytes == 0


@pytest.mark.parametrize("pool", [{"in_flight_mb": 1, "cache_mb": 0}], indirect=True)
async def test_many_askers_are_all_served_under_the_cap(pool: DecodePool, videos: list[str]) -> None:
    waits: list[float] = []

    async def episode(number: int) -> None:
        with request_owner(f"episode {number}"):
            for turn in range(3):
                began = time.monotonic()
                start = (number % 10) + turn / 10
                clip = await pool.zoom(videos[number % 8], ZoomRequest(start, start + 1, fps=8), SIZE)
                waits.append(time.monotonic() - began)
                assert len(clip.frames) == 8

    await asyncio.gather(*(episode(number) for number in range(64)))
    stats = await pool.stats()
    assert len(waits) == 192
    assert stats.in_flight_bytes == 0
    assert 2**19 < stats.peak_in_flight_bytes <= 2**20


@pytest.mark.parametrize("pool", [{"attempts": 1, "quarantine_after": 2}], indirect=True)
async def test_a_video_that_takes_decoders_with_it_is_quarantined(
    pool: DecodePool, videos: list[str]
) -> None:
    async def lose(uri: str) -> None:
        owner = pool._router.route(uri, set())
        await pool._back(owner, "this test")
        pid = send(pool._router.actors[owner], signal.SIGSTOP)
        pending = asyncio.create_task(pool.zoom(uri, ZoomRequest(1, 3, fps=4), SIZE))
        await asyncio.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(DecoderDiedError):
            await pending
        await pool._back(owner, "this test")

    await lose(videos[1])
    assert (
        len((await pool.zoom(videos[1], ZoomRequest(1, 3, fps=4), SIZE)).frames) == 8
    )  # cleared of suspicion
    await lose(videos[0])
    await lose(videos[1])
    await lose(videos[0])
    with pytest.raises(
        VideoQuarantinedError, match=r"a\.mp4: in quarantine \(a decoder died during zoom .* 2 such"
    ):
        await pool.zoom(videos[0], ZoomRequest(1, 3, fps=4), SIZE)
    assert len((await pool.zoom(videos[1], ZoomRequest(1, 3, fps=4), SIZE)).frames) == 8
    assert list((await pool.stats()).quarantined) == [videos[0]]


async def test_a_handle_works_inside_another_actor(pool: DecodePool, videos: list[str]) -> None:
    @ray.remote(num_cpus=0)
    class Asker:
        async def pts(self, handle: DecodePool, uri: str) -> list[float]:
            clip = await handle.zoom(uri, ZoomRequest(2, 4, fps=2), SIZE)
            return [frame.pts_s for frame in clip.frames]

    asker = Asker.remote()
    assert await asker.pts.remote(pool, videos[1]) == pytest.approx([2.0, 2.48, 3.0, 3.48])


async def test_errors_of_a_video_arrive_as_they_are(pool: DecodePool) -> None:
    with pytest.raises(VideoNotFoundError, match=r"nowhere\.mp4: no such file") as caught:
        await pool.probe("nowhere.mp4")
    assert type(caught.value) is VideoNotFoundError
    assert caught.value.model_message == "the video is missing"


async def test_a_failure_that_nobody_foresaw_is_a_video_error_too(
    pool: DecodePool, videos: list[str]
) -> None:
    with pytest.raises(UnexpectedReadError, match=r"a\.mp4: reading failed with ZeroDivisionError"):
        await pool.overview(videos[0], OverviewRequest(fps=1), FrameSize(factor=0))
    assert len((await pool.overview(videos[0], OverviewRequest(fps=1), SIZE)).frames) == 13


async def test_an_actor_killed_in_mid_request_costs_a_retry_and_comes_back(
    pool: DecodePool, videos: list[str]
) -> None:
    owner = pool._router.route(videos[0], set())
    pid = send(pool._router.actors[owner], signal.SIGSTOP)
    pending = asyncio.create_task(pool.zoom(videos[0], ZoomRequest(1, 3, fps=4), SIZE))
    await asyncio.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    clip = await pending
    assert len(clip.frames) == 8
    stats = await pool.stats()
    assert (stats.lost, stats.retried, stats.killed) == (1, 1, 0)
    await pool._back(owner, "this test")
    assert len((await pool.overview(videos[0], OverviewRequest(fps=1), SIZE)).frames) == 13
    assert (await pool.stats()).unresponsive == ()


@pytest.mark.parametrize("pool", [{"attempts": 1}], indirect=True)
async def test_a_request_that_loses_its_last_actor_says_so(pool: DecodePool, videos: list[str]) -> None:
    owner = pool._router.route(videos[0], set())
    pid = send(pool._router.actors[owner], signal.SIGSTOP)
    pending = asyncio.create_task(pool.probe(videos[0]))
    await asyncio.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(DecoderDiedError, match=rf"decoder-{owner} died during probe of .*, attempt 1 of 1"):
        await pending


@pytest.mark.parametrize("pool", [{"deadline_s": 2.0, "attempts": 1}], indirect=True)
async def test_a_hung_actor_is_named_and_replaced(pool: DecodePool, videos: list[str]) -> None:
    owner = pool._router.route(videos[0], set())
    pid = send(pool._router.actors[owner], signal.SIGSTOP)
    with pytest.raises(StepTimeout, match=rf"decoder-{owner} did not finish zoom of .*a\.mp4 \[1, 3\]"):
        await pool.zoom(videos[0], ZoomRequest(1, 3, fps=4), SIZE)
    assert (await pool.stats()).killed == 1
    assert await fresh_pid(pool, owner, pid) != pid
    assert len((await pool.zoom(videos[0], ZoomRequest(1, 3, fps=4), SIZE)).frames) == 8


async def fresh_pid(pool: DecodePool, index: int, before: int) -> int:
    """The actor's pid once Ray has restarted it."""
    for _ in range(60):
        try:
            call = pool._router.actors[index].__ray_call__.remote(lambda _: os.getpid())
            if (pid := int(await asyncio.wait_for(call, 10))) != before:
                return pid
        except (RayActorError, TimeoutError):
            pass
        await asyncio.sleep(0.5)
    raise AssertionError(f"decoder-{index} did not come back")


@pytest.mark.parametrize("pool", [{"deadline_s": 2.0}], indirect=True)
async def test_a_request_to_a_hung_actor_is_served_by_another(pool: DecodePool, videos: list[str]) -> None:
    owner = pool._router.route(videos[0], set())
    send(pool._router.actors[owner], signal.SIGSTOP)
    clip = await pool.zoom(videos[0], ZoomRequest(1, 3, fps=4), SIZE)
    assert len(clip.frames) == 8
    stats = await pool.stats()
    assert (stats.timed_out, stats.retried, stats.killed) == (1, 1, 1)


@pytest.mark.parametrize("pool", [{"spill": 2}], indirect=True)
async def test_a_video_spills_to_the_idlest_actor_only_when_its_own_is_behind(
    pool: DecodePool, videos: list[str]
) -> None:
    owner = pool._router.route(videos[0], set())
    assert [pool._router.route(videos[0], set()) for _ in range(3)] == [owner] * 3
    pool._router.in_flight[owner] = 1
    assert pool._router.route(videos[0], set()) == owner
    pool._router.in_flight[owner] = 2
    assert pool._router.route(videos[0], set()) == 1 - owner
    pool._router.in_flight[owner] = 0


@pytest.mark.parametrize("pool", [{"actors": 1}], indirect=True)
async def test_a_pool_of_one_waits_for_its_actor_to_come_back(pool: DecodePool, videos: list[str]) -> None:
    send(pool._router.actors[0], signal.SIGKILL)
    assert len((await pool.zoom(videos[2], ZoomRequest(1, 3, fps=4), SIZE)).frames) == 8


@pytest.mark.parametrize("pool", [{"actors": 1, "max_rss_mb": 1}], indirect=True)
async def test_an_actor_that_has_grown_starts_anew_and_nothing_is_lost(
    pool: DecodePool, videos: list[str]
) -> None:
    pid = ray.get(pool._router.actors[0].__ray_call__.remote(lambda _: os.getpid()))
    assert len((await pool.zoom(videos[0], ZoomRequest(1, 3, fps=4), SIZE)).frames) == 8
    assert await fresh_pid(pool, 0, pid) != pid
    for start in range(3):
        assert len((await pool.zoom(videos[0], ZoomRequest(start, start + 2, fps=4), SIZE)).frames) == 8
    assert (await pool.stats()).quarantined == {}


async def test_frames_are_read_only_views(pool: DecodePool, videos: list[str]) -> None:
    frame = (await pool.overview(videos[3], OverviewRequest(fps=1), SIZE)).frames[0]
    with pytest.raises(ValueError, match="read-only"):
        frame.rgb[0, 0, 0] = 1


@pytest.mark.parametrize(("key", "value"), [("actors", 0), ("deadline_s", 0.0), ("cpus", -1.0)])
def test_a_wrong_setting_is_named(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"clips\.{key} is {value}"):
        ClipsConfig(**{key: value})  # type: ignore[arg-type]
