"""An oracle corrects wrong zooms on real videos, and what is learned from it are its own turns alone."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from tests.needle.conftest import RULES
from vz_ray.config.distill import FilterConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.data.episode_record import EpisodeRecord
from vz_ray.distill.filters import count_prefix_turns, find_fault
from vz_ray.distill.reflection import exclusion_reason, make_reflection_job
from vz_ray.env.chat_format import ChatFormat, PromptTemplate
from vz_ray.env.trajectory import ExternalAction
from vz_ray.eval.eval_metrics import all_events_visible
from vz_ray.needle.exemplars import collect_exemplars
from vz_ray.needle.oracle import format_answer_turn, format_zoom_turn
from vz_ray.needle.reflections import (
    collect_reflections,
    correction_oracle_factory,
    sample_reflections,
    to_training_trajectory,
)
from vz_ray.rewards import score_episode
from vz_ray.utils.errors import UserError
from vz_ray.video.local_source import LocalFrameSource

REWARD = RewardConfig(max_zoom_frames=8)


@pytest.fixture(scope="module")
def wire(tokenizer):
    return ChatFormat(tokenizer, PromptTemplate.load(RULES.prompt))


class WrongPolicy:
    """A policy that zooms where it is told to, at once or twice, and answers wrongly."""

    def __init__(self, task, wire, zooms):
        self.task, self.wire, self.zooms = task, wire, zooms

    async def generate(self, prompt, sampling_params, *, request_id):
        turn = sum(message.role == "assistant" for message in prompt.messages)
        text = format_answer_turn("red", "disc", "Z")
        if turn < len(self.zooms):
            start, end, frames = self.zooms[turn]
            text = format_zoom_turn("there", start, end, frames / (end - start))
        return ExternalAction(text, self.wire.written(text))


def misplayed(tasks, wire, zooms_of):
    """Records of a policy that zoomed `[(start, end, frames)]` of each task, scored."""
    with LocalFrameSource() as frames:
        played = asyncio.run(
            collect_exemplars(
                tasks, frames, wire, RULES, lambda task: WrongPolicy(task, wire, zooms_of(task))
            )
        )
    return [
        EpisodeRecord(task, replace(t, reward=score_episode(t, task, REWARD)), "played")
        for task, t in zip(tasks, played, strict=True)
    ]


def corrected(records, wire):
    for record in records:
        assert exclusion_reason(record, wire.name, RULES.max_rounds) == ""
    jobs = [make_reflection_job(record, RULES.max_rounds, 0) for record in records]
    with LocalFrameSource() as frames:
        return asyncio.run(
            collect_reflections(jobs, frames, wire, RULES, REWARD, correction_oracle_factory(wire))
        )


def path_of(task):
    return [tuple(map(float, segment)) for segment in task.extra["path"]]


def elsewhere(task):
    """A shot with nothing in it that the question is about."""
    busy = [*path_of(task), *(tuple(map(float, span)) for span in task.extra["borders"])]
    shot = path_of(task)[0][1] - path_of(task)[0][0]
    starts = (k * shot for k in range(16))
    start = next(s for s in starts if not any(a < s + shot and s < b for a, b in busy))
    return (start, start + shot, 8)


@pytest.mark.parametrize("frames", [1, 3, 4])
def test_a_zoom_too_coarse_is_followed_by_a_closer_one_at_the_same_place(tasks, wire, frames):
    wrong = misplayed(tasks, wire, lambda task: [(*path_of(task)[0], frames)])
    closer = 0
    for before, record in zip(wrong, corrected(wrong, wire), strict=True):
        own = record.trajectory.turns[1:]
        assert record.trajectory.turns[0].action == before.trajectory.turns[0].action
        assert record.trajectory.reward.accuracy == 1
        assert all_events_visible(record.task, record.trajectory)
        if own[0].zoom is None:
            # Nothing was wrong with the zoom, so it is no reflection.
            assert all_events_visible(before.task, before.trajectory)
            assert find_fault(record, FilterConfig(), 8) == "did not zoom"
            continue
        assert find_fault(record, FilterConfig(), 8) == ""
        assert own[0].zoom.num_frames == 8
        if (own[0].zoom.start_s, own[0].zoom.end_s) == path_of(record.task)[0]:
            assert "more frames; " in own[0].text
            closer += 1
    assert closer >= len(tasks) // 4


def test_a_zoom_elsewhere_is_called_that_and_followed_by_one_at_the_right_place(tasks, wire):
    wrong = misplayed(tasks, wire, lambda task: [elsewhere(task)])
    for record in corrected(wrong, wire):
        own = record.trajectory.turns[1:]
        assert own[0].text.startswith("<think>outside; ")
        first = own[0].zoom
        assert (first.start_s, first.end_s, first.num_frames) == (*path_of(record.task)[0], 8)
        assert find_fault(record, FilterConfig(), 8) == ""
        # One zoom fewer than the path has only where it showed the event already.
        assert len(own) - 1 == len(path_of(record.task)) or all_events_visible(
            record.task, replace(record.trajectory, turns=record.trajectory.turns[:2])
        )


def test_of_two_places_the_one_that_was_looked_at_held_nothing(tasks, wire):
    decoys = [task for task in tasks if task.kind == "decoy"]
    assert decoys

    def other(task):
        borders = [tuple(map(float, span)) for span in task.extra["borders"]]
        return next(span for span in borders if span != path_of(task)[-1])

    wrong = misplayed(decoys, wire, lambda task: [(*other(task), 8)])
    for record in corrected(wrong, wire):
        (zoom, answer) = record.trajectory.turns[1:]
        assert zoom.text.startswith(f"<think>nothing; {record.task.extra['border']} border @")
        assert (zoom.zoom.start_s, zoom.zoom.end_s) == path_of(record.task)[-1]
        assert answer.zoom is None


def test_a_border_found_in_the_night_is_gone_on_from(tasks, wire):
    # A look at the night has one frame at the start of the border: the symbol is not always in it.
    deep = [task for task in tasks if task.kind == "deep" and task.events[0][0] > path_of(task)[1][0]]
    assert deep
    wrong = misplayed(deep, wire, lambda task: [elsewhere(task), (*path_of(task)[0], 8)])
    for record in corrected(wrong, wire):
        (zoom, _) = record.trajectory.turns[2:]
        assert zoom.text.startswith(f"<think>{record.task.extra['border']} border @")
        assert (zoom.zoom.start_s, zoom.zoom.end_s) == path_of(record.task)[1]


def test_a_count_looks_again_where_a_flash_may_hide_between_frames(tasks, wire):
    counts = [task for task in tasks if task.kind == "count"]
    wrong = misplayed(counts, wire, lambda task: [(*path_of(task)[0], 4)])
    for record in corrected(wrong, wire):
        assert isinstance(record.trajectory.turns[1].zoom.num_frames, int)
        assert "; more frames; " in record.trajectory.turns[1].text


def test_only_the_expert_s_turns_are_learned_from(tasks, wire):
    wrong = misplayed(tasks, wire, lambda task: [elsewhere(task)])
    for record in corrected(wrong, wire):
        assert count_prefix_turns(record) == 1
        whole, learned = record.trajectory, to_training_trajectory(record)
        assert learned.expanded_ids == whole.expanded_ids
        assert learned.frame_refs == whole.frame_refs
        assert learned.grids == whole.grids
        own = sum(len(turn.action.token_ids) for turn in whole.turns[1:])
        assert sum(learned.loss_mask) == own
        start = learned.prompt.num_tokens
        assert not any(learned.loss_mask[:start])
        np.testing.assert_array_equal(learned.loss_mask[start:], whole.loss_mask[start:])


def test_what_it_says_fits_a_turn_of_the_tiny_model(tasks, wire):
    wrong = misplayed(tasks, wire, lambda task: [(*path_of(task)[0], 4)])
    for record in corrected(wrong, wire):
        longest = max(len(turn.action.token_ids) for turn in record.trajectory.turns)
        assert longest <= RULES.max_turn_tokens
        assert record.trajectory.num_tokens <= RULES.max_context


def test_a_video_that_changed_since_is_named(tasks, wire):
    (record, *_) = misplayed(tasks[:1], wire, lambda task: [elsewhere(task)])
    job = make_reflection_job(record, RULES.max_rounds, 0)
    moved = replace(job, task=replace(job.task, video=tasks[-1].video))
    with (
        LocalFrameSource() as frames,
        pytest.raises(UserError, match=r"shows other frames than when it was played"),
    ):
        asyncio.run(
            collect_reflections([moved], frames, wire, RULES, REWARD, correction_oracle_factory(wire))
        )


def test_no_more_are_drawn_than_wanted_and_the_same_for_the_same_seed(tasks, wire):
    records = misplayed(tasks, wire, lambda task: [elsewhere(task)])
    some = sample_reflections(records, 5, 1)
    assert len(some) == 5
    assert some == sample_reflections(records, 5, 1) != sample_reflections(records, 5, 2)
    assert [record for record in records if record in some] == some
    assert sample_reflections(records, 100, 1) == records
