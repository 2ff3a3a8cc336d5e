"""Frame ranker actor with a real CLIP model of random weights."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from benchmarks.tiny_clip import QUESTIONS, build_clip
from tests.video.sample_videos import VideoSpec, write_video
from vz_ray.config.clips import ClipsConfig
from vz_ray.config.frame_selector import FrameSelectorConfig
from vz_ray.decode import DecodePool, FrameRankerHandle
from vz_ray.decode.frame_ranker import FrameRankerDiedError
from vz_ray.decode.image_text_model import ImageTextModel
from vz_ray.utils.errors import UserError
from vz_ray.utils.timeouts import StepTimeout
from vz_ray.video.clip_reader import ClipReader
from vz_ray.video.errors import VideoNotFoundError
from vz_ray.video.frame import FrameSize, OverviewRequest
from vz_ray.video.frame_selection import SelectionParams, select_frames

pytestmark = pytest.mark.asyncio(loop_scope="module")

PARAMS = SelectionParams(OverviewRequest(2.0, 64), FrameSize(784, 12_544, 28), 4)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    build_clip(folder)
    return str(folder)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_video(tmp_path_factory.mktemp("videos"), VideoSpec("v.mp4", frames=300)))


@pytest.fixture(scope="module")
def pool(ray_session: None) -> Iterator[DecodePool]:
    pool = DecodePool.start(ClipsConfig(num_actors=1, cpus_per_actor=0.2, disk_cache_gib=0))
    yield pool
    pool.close()


@pytest.fixture
def config(clip: str) -> FrameSelectorConfig:
    return FrameSelectorConfig("query", model=clip, batch_size=8)


async def test_actor_matches_local_model_and_selection(
    pool: DecodePool, config: FrameSelectorConfig, video: str
) -> None:
    ranker = FrameRankerHandle.start(config, pool)
    await ranker.wait_until_ready()
    times_s = await ranker.rank_frames(video, QUESTIONS[0], PARAMS)
    model = ImageTextModel(config.model, batch_size=100)
    frames = ClipReader().clip(video, PARAMS.candidates, PARAMS.size).frames
    features = model.encode_images([frame.rgb for frame in frames])
    indices = select_frames(features @ model.encode_text(QUESTIONS[0]), features, PARAMS)
    assert times_s == tuple(frames[index].pts_s for index in indices)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    ranker.close()


async def test_questions_share_video_features_and_results(
    pool: DecodePool, config: FrameSelectorConfig, video: str
) -> None:
    before = (await pool.stats()).reader
    ranker = FrameRankerHandle.start(config, pool)
    questions = [QUESTIONS[0], QUESTIONS[0], QUESTIONS[1], QUESTIONS[2]]
    results = await asyncio.gather(*(ranker.rank_frames(video, question, PARAMS) for question in questions))
    assert results[0] == results[1]
    assert await ranker.rank_frames(video, QUESTIONS[1], PARAMS) == results[2]
    assert await ranker._actor.__ray_call__.remote(lambda actor: actor._results.hits) >= 1
    after = (await pool.stats()).reader
    num_frames_read = after.hits + after.misses - before.hits - before.misses
    assert num_frames_read == 24  # the features of the video are computed once
    ranker.close()


async def test_request_is_retried_after_actor_death(pool: DecodePool, config: FrameSelectorConfig, video: str) -> None:
    ranker = FrameRankerHandle.start(config, pool)
    before = await ranker.rank_frames(video, QUESTIONS[0], PARAMS)
    ray.kill(ranker._actor, no_restart=False)
    assert await ranker.rank_frames(video, QUESTIONS[0], PARAMS) == before
    ranker.close()


async def test_closed_ranker_fails_without_waiting(pool: DecodePool, config: FrameSelectorConfig, video: str) -> None:
    ranker = FrameRankerHandle.start(config, pool)
    await ranker.wait_until_ready()
    ranker.close()
    with pytest.raises(FrameRankerDiedError, match="image-text model died"):
        await ranker.rank_frames(video, QUESTIONS[0], PARAMS)


async def test_errors_and_timeouts_name_video_and_question(
    pool: DecodePool, config: FrameSelectorConfig, video: str
) -> None:
    ranker = FrameRankerHandle.start(config, pool)
    await ranker.wait_until_ready()
    with pytest.raises(VideoNotFoundError, match=r"gone\.mp4"):
        await ranker.rank_frames("gone.mp4", "what?", PARAMS)
    short_timeout = FrameRankerHandle(ranker._actor, 1e-4)
    with pytest.raises(StepTimeout, match=rf"(?s)image-text model.*{Path(video).name} for 'what\?'"):
        await short_timeout.rank_frames(video, "what?", PARAMS)
    ranker.close()


async def test_missing_checkpoint_is_named(pool: DecodePool, config: FrameSelectorConfig, tmp_path: Path) -> None:
    missing = replace(config, model=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"none has no config\.json; episode\.selector\.model must be"):
        FrameRankerHandle.start(missing, pool)


async def test_broken_or_wrong_checkpoint_is_named(clip: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(clip).iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "config.json").write_text('{"model_type": "no_such"}')
    with pytest.raises(UserError, match="cannot load the image-text model"):
        ImageTextModel(str(broken))
    for name in ("config.json", "model.safetensors"):
        (broken / name).write_bytes((Path("assets/tiny-base") / name).read_bytes())
    with pytest.raises(UserError, match="which has no image and text features"):
        ImageTextModel(str(broken))
