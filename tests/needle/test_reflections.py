"""Reflections: the oracle corrects wrong zooms on real videos; only its turns have a loss."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from tests.needle.tiny_setup import EPISODE_CONFIG
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
from vz_ray.video.image_grid import ImageGrid
from vz_ray.video.local_source import LocalFrameSource

REWARD = RewardConfig(max_zoom_frames=8)


@pytest.fixture(scope="module")
def chat_format(tokenizer):
    return ChatFormat(tokenizer, PromptTemplate.load(EPISODE_CONFIG.prompt), grid=ImageGrid(14, 2))


class WrongPolicy:
    """Policy that zooms to the given segments and answers incorrectly."""

    def __init__(self, task, chat_format, zooms):
        self.task, self.chat_format, self.zooms = task, chat_format, zooms

    async def generate(self, prompt, sampling_params, *, request_id):
        turn = sum(message.role == "assistant" for message in prompt.messages)
        text = format_answer_turn("red", "disc", "Z")
        if turn < len(self.zooms):
            start, end, frames = self.zooms[turn]
            text = format_zoom_turn("there", start, end, frames / (end - start))
        return ExternalAction(text, self.chat_format.encode_assistant(text))


def make_wrong_records(tasks, chat_format, zooms_of):
    """Run and score a policy that zooms to `[(start, end, frames)]` of each task and answers incorrectly."""
    with LocalFrameSource() as frames:
        trajectories = asyncio.run(
            collect_exemplars(
                tasks,
                frames,
                chat_format,
                EPISODE_CONFIG,
                lambda task: WrongPolicy(task, chat_format, zooms_of(task)),
            )
        )
    return [
        EpisodeRecord(task, replace(t, reward=score_episode(t, task, REWARD)), "rollout")
        for task, t in zip(tasks, trajectories, strict=True)
    ]


def correct(records, chat_format):
    for record in records:
        assert exclusion_reason(record, chat_format.name, EPISODE_CONFIG.max_rounds) == ""
    jobs = [make_reflection_job(record, EPISODE_CONFIG.max_rounds, 0) for record in records]
    with LocalFrameSource() as frames:
        return asyncio.run(
            collect_reflections(
                jobs, frames, chat_format, EPISODE_CONFIG, REWARD, correction_oracle_factory(chat_format)
            )
        )


def zoom_path(task):
    return [tuple(map(float, segment)) for segment in task.extra["path"]]


def irrelevant_shot(task):
    """Return a shot without evidence or borders of the question."""
    relevant = [*zoom_path(task), *(tuple(map(float, span)) for span in task.extra["borders"])]
    shot = zoom_path(task)[0][1] - zoom_path(task)[0][0]
    starts = (k * shot for k in range(16))
    start = next(s for s in starts if not any(a < s + shot and s < b for a, b in relevant))
    return (start, start + shot, 8)


@pytest.mark.parametrize("frames", [1, 3, 4])
def test_sparse_zoom_is_repeated_at_full_rate(tasks, chat_format, frames):
    wrong = make_wrong_records(tasks, chat_format, lambda task: [(*zoom_path(task)[0], frames)])
    num_closer = 0
    for before, record in zip(wrong, correct(wrong, chat_format), strict=True):
        turns = record.trajectory.turns[1:]
        assert record.trajectory.turns[0].action == before.trajectory.turns[0].action
        assert record.trajectory.reward.accuracy == 1
        assert all_events_visible(record.task, record.trajectory)
        if turns[0].zoom is None:
            # The zoom was sufficient, so the episode is not a reflection.
            assert all_events_visible(before.task, before.trajectory)
            assert find_fault(record, FilterConfig(), 8) == "did not zoom"
            continue
        assert find_fault(record, FilterConfig(), 8) == ""
        assert turns[0].zoom.num_frames == 8
        if (turns[0].zoom.start_s, turns[0].zoom.end_s) == zoom_path(record.task)[0]:
            assert "more frames; " in turns[0].text
            num_closer += 1
    assert num_closer >= len(tasks) // 4


def test_wrong_segment_is_named_and_corrected(tasks, chat_format):
    wrong = make_wrong_records(tasks, chat_format, lambda task: [irrelevant_shot(task)])
    for record in correct(wrong, chat_format):
        turns = record.trajectory.turns[1:]
        assert turns[0].text.startswith("<think>outside; ")
        first = turns[0].zoom
        assert (first.start_s, first.end_s, first.num_frames) == (*zoom_path(record.task)[0], 8)
        assert find_fault(record, FilterConfig(), 8) == ""
        # One zoom fewer than the path only if it already showed the evidence.
        assert len(turns) - 1 == len(zoom_path(record.task)) or all_events_visible(
            record.task, replace(record.trajectory, turns=record.trajectory.turns[:2])
        )


def test_decoy_is_named_and_corrected(tasks, chat_format):
    decoys = [task for task in tasks if task.kind == "decoy"]
    assert decoys

    def decoy_span(task):
        borders = [tuple(map(float, span)) for span in task.extra["borders"]]
        return next(span for span in borders if span != zoom_path(task)[-1])

    wrong = make_wrong_records(decoys, chat_format, lambda task: [(*decoy_span(task), 8)])
    for record in correct(wrong, chat_format):
        (zoom, answer) = record.trajectory.turns[1:]
        assert zoom.text.startswith(f"<think>nothing; {record.task.extra['border']} border @")
        assert (zoom.zoom.start_s, zoom.zoom.end_s) == zoom_path(record.task)[-1]
        assert answer.zoom is None


def test_correction_continues_from_found_border(tasks, chat_format):
    # A zoom into the night has one frame at the start of the border, which may show the symbol.
    deep = [task for task in tasks if task.kind == "deep" and task.evidence_spans[0][0] > zoom_path(task)[1][0]]
    assert deep
    wrong = make_wrong_records(deep, chat_format, lambda task: [irrelevant_shot(task), (*zoom_path(task)[0], 8)])
    for record in correct(wrong, chat_format):
        (zoom, _) = record.trajectory.turns[2:]
        assert zoom.text.startswith(f"<think>{record.task.extra['border']} border @")
        assert (zoom.zoom.start_s, zoom.zoom.end_s) == zoom_path(record.task)[1]


def test_count_zooms_again_to_cover_every_slot(tasks, chat_format):
    counts = [task for task in tasks if task.kind == "count"]
    wrong = make_wrong_records(counts, chat_format, lambda task: [(*zoom_path(task)[0], 4)])
    for record in correct(wrong, chat_format):
        assert isinstance(record.trajectory.turns[1].zoom.num_frames, int)
        assert "; more frames; " in record.trajectory.turns[1].text


def test_only_corrected_turns_have_loss(tasks, chat_format):
    wrong = make_wrong_records(tasks, chat_format, lambda task: [irrelevant_shot(task)])
    for record in correct(wrong, chat_format):
        assert count_prefix_turns(record) == 1
        whole, folded = record.trajectory, to_training_trajectory(record)
        assert folded.expanded_ids == whole.expanded_ids
        assert folded.frame_refs == whole.frame_refs
        assert folded.grids == whole.grids
        num_tokens = sum(len(turn.action.token_ids) for turn in whole.turns[1:])
        assert sum(folded.loss_mask) == num_tokens
        start = folded.prompt.num_tokens
        assert not any(folded.loss_mask[:start])
        np.testing.assert_array_equal(folded.loss_mask[start:], whole.loss_mask[start:])


def test_corrections_fit_tiny_model_limits(tasks, chat_format):
    wrong = make_wrong_records(tasks, chat_format, lambda task: [(*zoom_path(task)[0], 4)])
    for record in correct(wrong, chat_format):
        max_tokens = max(len(turn.action.token_ids) for turn in record.trajectory.turns)
        assert max_tokens <= EPISODE_CONFIG.max_turn_tokens
        assert record.trajectory.num_tokens <= EPISODE_CONFIG.max_context


def test_changed_video_is_reported(tasks, chat_format):
    (record, *_) = make_wrong_records(tasks[:1], chat_format, lambda task: [irrelevant_shot(task)])
    job = make_reflection_job(record, EPISODE_CONFIG.max_rounds, 0)
    changed_job = replace(job, task=replace(job.task, video=tasks[-1].video))
    with (
        LocalFrameSource() as frames,
        pytest.raises(UserError, match=r"yields other frames than in the recording"),
    ):
        asyncio.run(
            collect_reflections(
                [changed_job],
                frames,
                chat_format,
                EPISODE_CONFIG,
                REWARD,
                correction_oracle_factory(chat_format),
            )
        )


def test_sampling_is_bounded_and_deterministic(tasks, chat_format):
    records = make_wrong_records(tasks, chat_format, lambda task: [irrelevant_shot(task)])
    sampled = sample_reflections(records, 5, 1)
    assert len(sampled) == 5
    assert sampled == sample_reflections(records, 5, 1) != sample_reflections(records, 5, 2)
    assert [record for record in records if record in sampled] == sampled
    assert sample_reflections(records, 100, 1) == records
