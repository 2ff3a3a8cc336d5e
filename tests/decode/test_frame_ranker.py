"""Frames for a question, from a real CLIP of random weights in a real actor."""

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

SEARCH = SelectionParams(OverviewRequest(2.0, 64), FrameSize(784, 12_544), 4)


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


async def test_the_actor_chooses_what_the_model_and_the_rule_choose(
    pool: DecodePool, config: FrameSelectorConfig, video: str
) -> None:
    ranking = FrameRankerHandle.start(config, pool)
    await ranking.wait_until_ready()
    found = await ranking.rank_frames(video, QUESTIONS[0], SEARCH)
    model = ImageTextModel(config.model, batch_size=100)
    frames = ClipReader().overview(video, SEARCH.candidates, SEARCH.size).frames
    features = model.encode_images([frame.rgb for frame in frames])
    chosen = select_frames(features @ model.encode_text(QUESTIONS[0]), features, SEARCH)
    assert found == tuple(frames[place].pts_s for place in chosen)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    ranking.close()


async def test_questions_of_a_video_share_one_look_and_samples_of_a_task_one_answer(
    pool: DecodePool, config: FrameSelectorConfig, video: str
) -> None:
    ranking = FrameRankerHandle.start(config, pool)
    asked = [QUESTIONS[0], QUESTIONS[0], QUESTIONS[1], QUESTIONS[2]]
    answers = await asyncio.gather(*(ranking.rank_frames(video, question, SEARCH) for question in asked))
    assert answers[0] == answers[1]
    assert await ranking.rank_frames(video, QUESTIONS[1], SEARCH) == answers[2]
    stats = await ranking.stats()
    assert (stats.questions, stats.embedded_videos, stats.embedded_images) == (5, 1, 24)
    assert stats.cache_hits >= 1
    ranking.close()


async def test_an_actor_that_dies_comes_back(
    pool: DecodePool, config: FrameSelectorConfig, video: str
) -> None:
    ranking = FrameRankerHandle.start(config, pool)
    before = await ranking.rank_frames(video, QUESTIONS[0], SEARCH)
    ray.kill(ranking._actor, no_restart=False)
    assert await ranking.rank_frames(video, QUESTIONS[0], SEARCH) == before
    ranking.close()


async def test_an_actor_that_was_ended_is_not_waited_for(
    pool: DecodePool, config: FrameSelectorConfig, video: str
) -> None:
    ranking = FrameRankerHandle.start(config, pool)
    await ranking.wait_until_ready()
    ranking.close()
    with pytest.raises(FrameRankerDiedError, match="image-text model died"):
        await ranking.rank_frames(video, QUESTIONS[0], SEARCH)


async def test_errors_and_waits_name_video_and_question(
    pool: DecodePool, config: FrameSelectorConfig, video: str
) -> None:
    ranking = FrameRankerHandle.start(config, pool)
    await ranking.wait_until_ready()
    with pytest.raises(VideoNotFoundError, match=r"gone\.mp4"):
        await ranking.rank_frames("gone.mp4", "what?", SEARCH)
    hasty = FrameRankerHandle(ranking._actor, 1e-4)
    with pytest.raises(StepTimeout, match=rf"(?s)image-text model.*{Path(video).name} for 'what\?'"):
        await hasty.rank_frames(video, "what?", SEARCH)
    ranking.close()


async def test_a_checkpoint_that_is_not_there_is_named(
    pool: DecodePool, config: FrameSelectorConfig, tmp_path: Path
) -> None:
    absent = replace(config, model=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"none has no config\.json; episode\.selector\.model must be"):
        FrameRankerHandle.start(absent, pool)


async def test_a_checkpoint_of_another_kind_or_that_is_broken_is_named(clip: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(clip).iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "config.json").write_text('{"model_type": "no_such"}')
    with pytest.raises(UserError, match="cannot load the image-text model"):
        ImageTextModel(str(broken))
    for name in ("config.json", "model.safetensors"):
        (broken / name).write_bytes((Path("assets/tiny-base") / name).read_bytes())
    with pytest.raises(UserError, match="which does not compare images with texts"):
        ImageTextModel(str(broken))
