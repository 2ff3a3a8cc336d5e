"""Frames for a question, from a real CLIP of random weights in a real actor."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from benchmarks.tiny_clip import QUESTIONS, build
from tests.video.making import Made, make
from vz_ray.clips import ClipPool, Ranking
from vz_ray.clips.image_text import ImageText
from vz_ray.clips.ranking import RankerLost
from vz_ray.config.clips import ClipsConfig
from vz_ray.config.selector import SelectorConfig
from vz_ray.observe.deadline import Overdue
from vz_ray.observe.errors import UserError
from vz_ray.video.choice import Search, choose
from vz_ray.video.clip_reader import ClipReader
from vz_ray.video.errors import VideoMissing
from vz_ray.video.frame import FrameSize, Overview

pytestmark = pytest.mark.asyncio(loop_scope="module")

SEARCH = Search(Overview(2.0, 64), FrameSize(784, 12_544), 4)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    build(folder)
    return str(folder)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make(tmp_path_factory.mktemp("videos"), Made("v.mp4", frames=300)))


@pytest.fixture(scope="module")
def pool(ray_session: None) -> Iterator[ClipPool]:
    pool = ClipPool.start(ClipsConfig(actors=1, cpus=0.2, disk_gb=0))
    yield pool
    pool.close()


@pytest.fixture
def config(clip: str) -> SelectorConfig:
    return SelectorConfig("query", model=clip, batch=8)


async def test_the_actor_chooses_what_the_model_and_the_rule_choose(
    pool: ClipPool, config: SelectorConfig, video: str
) -> None:
    ranking = Ranking.start(config, pool)
    await ranking.ready()
    found = await ranking.rank(video, QUESTIONS[0], SEARCH)
    model = ImageText(config.model, batch=100)
    frames = ClipReader().overview(video, SEARCH.grid, SEARCH.size).frames
    features = model.images([frame.rgb for frame in frames])
    chosen = choose(features @ model.text(QUESTIONS[0]), features, SEARCH)
    assert found == tuple(frames[place].pts_s for place in chosen)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    ranking.close()


async def test_questions_of_a_video_share_one_look_and_samples_of_a_task_one_answer(
    pool: ClipPool, config: SelectorConfig, video: str
) -> None:
    ranking = Ranking.start(config, pool)
    asked = [QUESTIONS[0], QUESTIONS[0], QUESTIONS[1], QUESTIONS[2]]
    answers = await asyncio.gather(*(ranking.rank(video, question, SEARCH) for question in asked))
    assert answers[0] == answers[1]
    assert await ranking.rank(video, QUESTIONS[1], SEARCH) == answers[2]
    stats = await ranking.stats()
    assert (stats.asked, stats.videos, stats.images) == (5, 1, 24)
    assert stats.repeated >= 1
    ranking.close()


async def test_an_actor_that_dies_comes_back(pool: ClipPool, config: SelectorConfig, video: str) -> None:
    ranking = Ranking.start(config, pool)
    before = await ranking.rank(video, QUESTIONS[0], SEARCH)
    ray.kill(ranking._actor, no_restart=False)
    assert await ranking.rank(video, QUESTIONS[0], SEARCH) == before
    ranking.close()


async def test_an_actor_that_was_ended_is_not_waited_for(
    pool: ClipPool, config: SelectorConfig, video: str
) -> None:
    ranking = Ranking.start(config, pool)
    await ranking.ready()
    ranking.close()
    with pytest.raises(RankerLost, match="image-text model died"):
        await ranking.rank(video, QUESTIONS[0], SEARCH)


async def test_errors_and_waits_name_video_and_question(
    pool: ClipPool, config: SelectorConfig, video: str
) -> None:
    ranking = Ranking.start(config, pool)
    await ranking.ready()
    with pytest.raises(VideoMissing, match=r"gone\.mp4"):
        await ranking.rank("gone.mp4", "what?", SEARCH)
    hasty = Ranking(ranking._actor, 1e-4)
    with pytest.raises(Overdue, match=rf"(?s)image-text model.*{Path(video).name} for 'what\?'"):
        await hasty.rank(video, "what?", SEARCH)
    ranking.close()


async def test_a_checkpoint_that_is_not_there_is_named(
    pool: ClipPool, config: SelectorConfig, tmp_path: Path
) -> None:
    absent = replace(config, model=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"none has no config\.json; episode\.selector\.model must be"):
        Ranking.start(absent, pool)


async def test_a_checkpoint_of_another_kind_or_that_is_broken_is_named(clip: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(clip).iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "config.json").write_text('{"model_type": "no_such"}')
    with pytest.raises(UserError, match="cannot load the image-text model"):
        ImageText(str(broken))
    for name in ("config.json", "model.safetensors"):
        (broken / name).write_bytes((Path("assets/tiny-base") / name).read_bytes())
    with pytest.raises(UserError, match="which does not compare images with texts"):
        ImageText(str(broken))
