"""Oracles play real videos through the ordinary runner, and what they leave is right."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.coldstart.conftest import RULES
from vz_ray.coldstart.exemplars import answering, play_exemplars, zooming
from vz_ray.config.episode import uniform
from vz_ray.config.reward import RewardConfig
from vz_ray.episode.trajectory import Status
from vz_ray.episode.wire import WireFormat, Wording
from vz_ray.evaluate.metrics import saw_all_events
from vz_ray.observe.errors import UserError
from vz_ray.reward import score
from vz_ray.video.local import LocalFrames


def played(tasks, tokenizer, rules, expert):
    wire = WireFormat(tokenizer, Wording.load(rules.prompt))
    with LocalFrames() as frames:
        return asyncio.run(play_exemplars(tasks, frames, wire, rules, expert(wire)))


def test_the_oracle_is_right_sees_every_event_and_earns_every_reward(tasks, tokenizer):
    trajectories = played(tasks, tokenizer, RULES, zooming)
    reward = RewardConfig(max_zoom_frames=8)
    for task, trajectory in zip(tasks, trajectories, strict=True):
        assert trajectory.status is Status.ANSWERED
        assert saw_all_events(task, trajectory)
        parts = score(trajectory, task, reward)
        assert (parts.accuracy, parts.format, parts.tool) == (1.0, 1.0, 1.0)
        assert len(trajectory.zooms) == len(task.extra["path"]) == trajectory.zooms_tried
    kinds = {task.kind: len(t.zooms) for task, t in zip(tasks, trajectories, strict=True)}
    assert kinds["deep"] == 2


def test_sparse_experts_look_at_half_the_frames_where_these_show_enough(tasks, tokenizer):
    many = [replace(task, task_id=f"{task.task_id}/{n}") for task in tasks for n in range(6)]

    def looks(sparse, seed):
        one_by_one = played(many, tokenizer, RULES, lambda wire: zooming(wire, sparse, seed))
        assert all(saw_all_events(task, one) for task, one in zip(many, one_by_one, strict=True))
        return [turn.zoom.frame_count for one in one_by_one for turn in one.turns if turn.zoom]

    some = looks(0.9, 3)
    assert 0.2 < some.count(4) / len(some) < 0.8
    assert set(some) == {4, 8}
    assert looks(0.9, 3) == some
    assert looks(0.9, 4) != some
    assert set(looks(0.0, 3)) == {8}


def test_the_answering_oracle_says_only_what_its_frames_show(tasks, tokenizer):
    rules = replace(uniform(RULES, 32), prompt="conf/prompt/tiny-answer.yaml")
    trajectories = played(tasks, tokenizer, rules, answering)
    assert {len(t.refs) for t in trajectories} == {32}
    for task, trajectory in zip(tasks, trajectories, strict=True):
        (turn,) = trajectory.turns
        shown = any(a <= ref.pts_s < b for ref in trajectory.refs for a, b in task.events)
        assert (str(task.extra["symbol"]) in turn.text) == shown
        assert trajectory.answer == task.answer


def test_a_task_without_truth_is_named(tasks, tokenizer):
    blind = [replace(tasks[0], extra={})]
    with pytest.raises(ValueError, match=f"task {tasks[0].task_id} has no truth"):
        played(blind, tokenizer, RULES, zooming)


def test_a_missing_video_is_named(tasks, tokenizer):
    gone = [replace(tasks[0], video="nowhere.mp4")]
    with pytest.raises(UserError, match=r"nowhere\.mp4"):
        played(gone, tokenizer, RULES, zooming)


def test_the_tokenizer_keeps_numbers_and_tags_whole_and_loses_nothing(tokenizer):
    text = '<think>red border @348.50</think><video_zoom>{"segment":[348.50,352.00],"fps":2}</video_zoom>'
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    whole = {"348", ".50", "352", ".00", "<video_zoom>", "</video_zoom>"}
    assert whole <= {tokenizer.decode([i]) for i in ids}
