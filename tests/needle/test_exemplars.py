"""Exemplars of the oracles on real videos."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.needle.tiny_setup import EPISODE_CONFIG
from vz_ray.config.episode import uniform_frames_config
from vz_ray.config.reward import RewardConfig
from vz_ray.env.chat_format import ChatFormat, PromptTemplate
from vz_ray.env.trajectory import EpisodeStatus
from vz_ray.eval.eval_metrics import all_events_visible
from vz_ray.needle.exemplars import collect_exemplars, uniform_oracle_factory, zoom_oracle_factory
from vz_ray.rewards import score_episode
from vz_ray.utils.errors import UserError
from vz_ray.video.image_grid import ImageGrid
from vz_ray.video.local_source import LocalFrameSource


def collect(tasks, tokenizer, episode_config, make_factory):
    chat_format = ChatFormat(tokenizer, PromptTemplate.load(episode_config.prompt), grid=ImageGrid(14, 2))
    with LocalFrameSource() as frames:
        factory = make_factory(chat_format)
        return asyncio.run(collect_exemplars(tasks, frames, chat_format, episode_config, factory))


def test_zoom_oracle_earns_full_reward(tasks, tokenizer):
    trajectories = collect(tasks, tokenizer, EPISODE_CONFIG, zoom_oracle_factory)
    reward = RewardConfig(max_zoom_frames=8)
    for task, trajectory in zip(tasks, trajectories, strict=True):
        assert trajectory.status is EpisodeStatus.ANSWERED
        assert all_events_visible(task, trajectory)
        parts = score_episode(trajectory, task, reward)
        assert (parts.accuracy, parts.format, parts.tool) == (1.0, 1.0, 1.0)
        assert len(trajectory.zooms) == len(task.extra["path"]) == trajectory.num_zoom_calls
    kinds = {task.kind: len(t.zooms) for task, t in zip(tasks, trajectories, strict=True)}
    assert kinds["deep"] == 2


def test_sparse_zooms_still_show_evidence(tasks, tokenizer):
    copies = [replace(task, task_id=f"{task.task_id}/{n}") for task in tasks for n in range(6)]

    def zoom_frames(share, seed):
        trajectories = collect(
            copies,
            tokenizer,
            EPISODE_CONFIG,
            lambda chat_format: zoom_oracle_factory(chat_format, share, seed),
        )
        assert all(all_events_visible(task, t) for task, t in zip(copies, trajectories, strict=True))
        return [turn.zoom.num_frames for t in trajectories for turn in t.turns if turn.zoom]

    counts = zoom_frames(0.9, 3)
    assert 0.2 < counts.count(4) / len(counts) < 0.8
    assert set(counts) == {4, 8}
    assert zoom_frames(0.9, 3) == counts
    assert zoom_frames(0.9, 4) != counts
    assert set(zoom_frames(0.0, 3)) == {8}


def test_uniform_oracle_describes_visible_symbols(tasks, tokenizer):
    episode_config = replace(uniform_frames_config(EPISODE_CONFIG, 32), prompt="conf/prompt/tiny-answer.yaml")
    trajectories = collect(tasks, tokenizer, episode_config, uniform_oracle_factory)
    assert {len(t.frame_refs) for t in trajectories} == {32}
    for task, trajectory in zip(tasks, trajectories, strict=True):
        (turn,) = trajectory.turns
        visible = any(a <= ref.pts_s < b for ref in trajectory.frame_refs for a, b in task.evidence_spans)
        assert (str(task.extra["symbol"]) in turn.text) == visible
        assert trajectory.answer == task.answer


def test_task_without_truth_is_reported(tasks, tokenizer):
    without_truth = [replace(tasks[0], extra={})]
    with pytest.raises(ValueError, match=f"task {tasks[0].task_id} has no ground truth"):
        collect(without_truth, tokenizer, EPISODE_CONFIG, zoom_oracle_factory)


def test_missing_video_is_reported(tasks, tokenizer):
    missing = [replace(tasks[0], video="missing.mp4")]
    with pytest.raises(UserError, match=r"missing\.mp4"):
        collect(missing, tokenizer, EPISODE_CONFIG, zoom_oracle_factory)


def test_tokenizer_keeps_numbers_and_tags_as_tokens(tokenizer):
    text = '<think>red border @348.50</think><video_zoom>{"segment":[348.50,352.00],"fps":2}</video_zoom>'
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    single_tokens = {"348", ".50", "352", ".00", "<video_zoom>", "</video_zoom>"}
    assert single_tokens <= {tokenizer.decode([i]) for i in ids}
