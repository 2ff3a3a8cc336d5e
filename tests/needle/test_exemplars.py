"""Oracles play real videos through the ordinary runner, and what they leave is right."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.needle.conftest import RULES
from vz_ray.config.episode import uniform_frames_config
from vz_ray.config.reward import RewardConfig
from vz_ray.env.chat_format import ChatFormat, PromptTemplate
from vz_ray.env.trajectory import EpisodeStatus
from vz_ray.eval.eval_metrics import all_events_visible
from vz_ray.needle.exemplars import collect_exemplars, uniform_oracle_factory, zoom_oracle_factory
from vz_ray.rewards import score_episode
from vz_ray.utils.errors import UserError
from vz_ray.video.local_source import LocalFrameSource


def played(tasks, tokenizer, rules, expert):
    wire = ChatFormat(tokenizer, PromptTemplate.load(rules.prompt))
    with LocalFrameSource() as frames:
        return asyncio.run(collect_exemplars(tasks, frames, wire, rules, expert(wire)))


def test_the_oracle_is_right_sees_every_event_and_earns_every_reward(tasks, tokenizer):
    trajectories = played(tasks, tokenizer, RULES, zoom_oracle_factory)
    reward = RewardConfig(max_zoom_frames=8)
    for task, trajectory in zip(tasks, trajectories, strict=True):
        assert trajectory.status is EpisodeStatus.ANSWERED
        assert all_events_visible(task, trajectory)
        parts = score_episode(trajectory, task, reward)
        assert (parts.accuracy, parts.format, parts.tool) == (1.0, 1.0, 1.0)
        assert len(trajectory.zooms) == len(task.extra["path"]) == trajectory.num_zoom_calls
    kinds = {task.kind: len(t.zooms) for task, t in zip(tasks, trajectories, strict=True)}
    assert kinds["deep"] == 2


def test_sparse_experts_look_at_half_the_frames_where_these_show_enough(tasks, tokenizer):
    many = [replace(task, task_id=f"{task.task_id}/{n}") for task in tasks for n in range(6)]

    def looks(sparse, seed):
        one_by_one = played(many, tokenizer, RULES, lambda wire: zoom_oracle_factory(wire, sparse, seed))
        assert all(all_events_visible(task, one) for task, one in zip(many, one_by_one, strict=True))
        return [turn.zoom.num_frames for one in one_by_one for turn in one.turns if turn.zoom]

    some = looks(0.9, 3)
    assert 0.2 < some.count(4) / len(some) < 0.8
    assert set(some) == {4, 8}
    assert looks(0.9, 3) == some
    assert looks(0.9, 4) != some
    assert set(looks(0.0, 3)) == {8}


def test_the_answering_oracle_says_only_what_its_frames_show(tasks, tokenizer):
    rules = replace(uniform_frames_config(RULES, 32), prompt="conf/prompt/tiny-answer.yaml")
    trajectories = played(tasks, tokenizer, rules, uniform_oracle_factory)
    assert {len(t.frame_refs) for t in trajectories} == {32}
    for task, trajectory in zip(tasks, trajectories, strict=True):
        (turn,) = trajectory.turns
        shown = any(a <= ref.pts_s < b for ref in trajectory.frame_refs for a, b in task.events)
        assert (str(task.extra["symbol"]) in turn.text) == shown
        assert trajectory.answer == task.answer


def test_a_task_without_truth_is_named(tasks, tokenizer):
    blind = [replace(tasks[0], extra={})]
    with pytest.raises(ValueError, match=f"task {tasks[0].task_id} has no truth"):
        played(blind, tokenizer, RULES, zoom_oracle_factory)


def test_a_missing_video_is_named(tasks, tokenizer):
    gone = [replace(tasks[0], video="nowhere.mp4")]
    with pytest.raises(UserError, match=r"nowhere\.mp4"):
        played(gone, tokenizer, RULES, zoom_oracle_factory)


def test_the_tokenizer_keeps_numbers_and_tags_whole_and_loses_nothing(tokenizer):
    text = '<think>red border @348.50</think><video_zoom>{"segment":[348.50,352.00],"fps":2}</video_zoom>'
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    whole = {"348", ".50", "352", ".00", "<video_zoom>", "</video_zoom>"}
    assert whole <= {tokenizer.decode([i]) for i in ids}
