"""Reflection jobs from wrong_records episodes, and the teacher's continuation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.distill.oracle_server import (
    WRONG_ZOOM_TURN,
    ContinuationOracleServer,
    count_turns,
    make_completion,
    message_text,
)
from tests.distill.teacher_episodes import run_teacher_jobs
from tests.rewards.fake_endpoint import serve_endpoint
from vz_ray.config.distill import FilterConfig
from vz_ray.data.episode_record import append_records
from vz_ray.data.sft_file import fold_turns_into_prompt, trajectory_to_sample
from vz_ray.distill.filters import count_prefix_turns, find_fault
from vz_ray.distill.reflection import exclusion_reason, find_episode_logs, load_reflection_jobs
from vz_ray.distill.teacher_runner import TeacherJob
from vz_ray.distill.zoom_patterns import ZoomPattern, classify_pattern
from vz_ray.env.trajectory import EpisodeStatus, SampledAction, SamplingParams, VersionSpan
from vz_ray.utils.errors import UserError


def as_sampled(turn):
    """Convert a teacher turn into a turn sampled by the policy."""
    ids = turn.action.token_ids
    action = SampledAction(ids, (-0.1,) * len(ids), (VersionSpan(0, len(ids), 3),), SamplingParams(), "zoom")
    return replace(turn, action=action)


@pytest.fixture
def wrong_records(needle_tasks, chat_format, episode_config, tmp_path):
    """Episodes of a policy that zooms to the start and answers incorrectly."""

    def answer_wrongly(number, body):
        return make_completion(WRONG_ZOOM_TURN if not count_turns(body) else "<think>x</think><answer>Z</answer>")

    with serve_endpoint(answer_wrongly) as endpoint:
        jobs = [TeacherJob(task, 0) for task in needle_tasks[:3]]
        log, _, raised = run_teacher_jobs(endpoint.url, jobs, chat_format, episode_config, tmp_path / "policy")
    assert raised is None
    return [
        replace(r, trajectory=replace(r.trajectory, turns=tuple(map(as_sampled, r.trajectory.turns)), extra={}))
        for r in log.records
    ]


def test_teacher_continues_after_prefix(wrong_records, needle_tasks, chat_format, episode_config, tmp_path):
    path = tmp_path / "episodes" / "000001.jsonl"
    append_records(path, wrong_records)
    jobs, counts = load_reflection_jobs(
        find_episode_logs([str(tmp_path / "episodes")]), chat_format.name, max_rounds=5, max_per_task=2
    )
    assert counts == {"episodes": 3}
    with serve_endpoint(ContinuationOracleServer(needle_tasks, chat_format)) as endpoint:
        log, ledger, raised = run_teacher_jobs(endpoint.url, jobs, chat_format, episode_config, tmp_path / "reflect")
    assert raised is None
    assert len(log.records) == 3
    for record, before in zip(log.records, wrong_records, strict=True):
        trajectory = record.trajectory
        assert count_prefix_turns(record) == 1
        assert trajectory.turns[0].action == before.trajectory.turns[0].action
        assert trajectory.prompt == before.trajectory.prompt
        assert trajectory.turns[0].observation == before.trajectory.turns[0].observation
        assert find_fault(record, FilterConfig(), 8) == ""
        assert classify_pattern(trajectory) in (ZoomPattern.CORRECTED, ZoomPattern.PROGRESSIVE)
    # Prefix turns are replayed without a request.
    teacher_turns = sum(len(r.trajectory.turns) - 1 for r in log.records)
    assert len(endpoint.requests) == teacher_turns == ledger.totals.requests
    assert message_text(endpoint.requests[0]["messages"][0]).endswith("\nguide")


def test_prefix_turns_have_no_loss(wrong_records, needle_tasks, chat_format, episode_config, tmp_path):
    path = tmp_path / "e.jsonl"
    append_records(path, wrong_records[:1])
    jobs, _ = load_reflection_jobs([path], chat_format.name, max_rounds=5, max_per_task=2)
    with serve_endpoint(ContinuationOracleServer(needle_tasks, chat_format)) as endpoint:
        log, _, _ = run_teacher_jobs(endpoint.url, jobs, chat_format, episode_config, tmp_path / "reflect")
    whole = log.records[0].trajectory
    learned = fold_turns_into_prompt(whole, 1)
    assert learned.expanded_ids == whole.expanded_ids
    assert learned.frame_refs == whole.frame_refs
    assert learned.grids == whole.grids
    mask, before = np.array(learned.loss_mask), np.array(whole.loss_mask)
    first = whole.prompt.num_tokens + len(whole.turns[0].action.token_ids)
    assert mask[:first].sum() == 0
    np.testing.assert_array_equal(mask[first:], before[first:])
    sample = trajectory_to_sample(whole, chat_format, lambda ref: ref.digest, num_context_turns=1)
    weights = [m.get("weight") for m in sample["messages"] if m["role"] == "assistant"]
    assert weights == [0, *[None] * (len(whole.turns) - 1)]


def test_changed_video_fails_before_request(wrong_records, needle_tasks, chat_format, episode_config, tmp_path):
    path = tmp_path / "e.jsonl"
    append_records(path, wrong_records[:1])
    jobs, _ = load_reflection_jobs([path], chat_format.name, max_rounds=5, max_per_task=2)
    other = replace(jobs[0], task=replace(jobs[0].task, video=needle_tasks[-1].video))
    with serve_endpoint(ContinuationOracleServer(needle_tasks, chat_format)) as endpoint:
        log, _, _ = run_teacher_jobs(endpoint.url, [other], chat_format, episode_config, tmp_path / "reflect")
    assert log.records[0].trajectory.status is EpisodeStatus.FAILED
    assert "yields other frames" in log.records[0].trajectory.error
    assert not endpoint.requests


def test_excluded_episodes_are_counted_by_reason(wrong_records, chat_format, tmp_path):
    record, format_name = wrong_records[0], chat_format.name
    trajectory = record.trajectory
    excluded = {
        "already correct": replace(trajectory, reward=replace(trajectory.reward, accuracy=1.0)),
        "ended as truncated": replace(trajectory, status=EpisodeStatus.TRUNCATED),
        "ended as failed": replace(trajectory, status=EpisodeStatus.FAILED, turns=()),
        "not scored": replace(trajectory, reward=None),
        "did not zoom": replace(trajectory, turns=trajectory.turns[1:]),
        "different chat format": replace(trajectory, chat_format="clean-000000000000"),
    }
    for reason, variant in excluded.items():
        assert exclusion_reason(replace(record, trajectory=variant), format_name, 5) == reason
    path = tmp_path / "e.jsonl"
    append_records(path, [record, record, *(replace(record, trajectory=t) for t in excluded.values())])
    jobs, counts = load_reflection_jobs([path], format_name, max_rounds=5, max_per_task=1)
    assert len(jobs) == 1
    assert counts == {"episodes": 8, "task limit": 1, **dict.fromkeys(excluded, 1)}


def test_prefix_leaves_rounds_for_teacher(wrong_records, chat_format, tmp_path):
    record = wrong_records[0]
    turns = (*[record.trajectory.turns[0]] * 4, record.trajectory.turns[1])
    path = tmp_path / "e.jsonl"
    append_records(path, [replace(record, trajectory=replace(record.trajectory, turns=turns))])
    jobs, _ = load_reflection_jobs([path], chat_format.name, max_rounds=5, max_per_task=1)
    assert len(jobs[0].prefix_turns) == 3


def test_invalid_log_files_are_reported(tmp_path):
    with pytest.raises(UserError, match="no episode log at"):
        find_episode_logs([str(tmp_path)])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl is not an episode log"):
        load_reflection_jobs([tmp_path / "metrics.jsonl"], "w", max_rounds=5, max_per_task=1)
