"""An expert takes over from a policy that zoomed wrongly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.distill.oracle_server import OracleServer, count_turns, make_completion, message_text
from tests.distill.test_teacher_runner import produce
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

WRONG = '<think>there</think><video_zoom>{"segment":[0.00,2.00],"fps":2}</video_zoom>'


def sampled(turn):
    """The same turn as if the policy had sampled it."""
    ids = turn.action.token_ids
    action = SampledAction(ids, (-0.1,) * len(ids), (VersionSpan(0, len(ids), 3),), SamplingParams(), "zoom")
    return replace(turn, action=action)


@pytest.fixture
def wrong(needle_tasks, tiny_wire, rules, tmp_path):
    """Episodes of a policy that zooms to the start and answers wrongly."""

    def misses(number, body):
        return make_completion(WRONG if not count_turns(body) else "<think>x</think><answer>Z</answer>")

    with serve_endpoint(misses) as endpoint:
        jobs = [TeacherJob(task, 0) for task in needle_tasks[:3]]
        log, _, raised = produce(endpoint.url, jobs, tiny_wire, rules, tmp_path / "policy")
    assert raised is None
    return [
        replace(r, trajectory=replace(r.trajectory, turns=tuple(map(sampled, r.trajectory.turns)), extra={}))
        for r in log.records
    ]


def behind(body):
    """What the oracle sees: the policy's turn is none of its own."""
    own = [m for m in body["messages"] if m["role"] == "assistant"]
    return {**body, "messages": [m for m in body["messages"] if m is not own[0]]} if own else body


class TakesOver(OracleServer):
    def __call__(self, number, body):
        return super().__call__(number, behind(body))


def test_the_expert_goes_on_after_the_policy_s_zoom_and_the_outcome_is_one_trajectory(
    wrong, needle_tasks, tiny_wire, rules, tmp_path
):
    path = tmp_path / "episodes" / "000001.jsonl"
    append_records(path, wrong)
    jobs, counts = load_reflection_jobs(
        find_episode_logs([str(tmp_path / "episodes")]), tiny_wire.name, max_rounds=5, max_per_task=2
    )
    assert counts == {"episodes": 3}
    with serve_endpoint(TakesOver(needle_tasks, tiny_wire)) as endpoint:
        log, account, raised = produce(endpoint.url, jobs, tiny_wire, rules, tmp_path / "reflect")
    assert raised is None
    assert len(log.records) == 3
    for record, before in zip(log.records, wrong, strict=True):
        trajectory = record.trajectory
        assert count_prefix_turns(record) == 1
        assert trajectory.turns[0].action == before.trajectory.turns[0].action
        assert trajectory.prompt == before.trajectory.prompt
        assert trajectory.turns[0].observation == before.trajectory.turns[0].reply
        assert find_fault(record, FilterConfig(), 8) == ""
        assert classify_pattern(trajectory) in (ZoomPattern.CORRECTED, ZoomPattern.PROGRESSIVE)
    # The policy's own turns are repeated, not asked for.
    own = sum(len(r.trajectory.turns) - 1 for r in log.records)
    assert len(endpoint.requests) == own == account.totals.requests
    assert message_text(endpoint.requests[0]["messages"][0]).endswith("\nguide")


def test_the_policy_s_turns_are_read_and_not_learned_from(wrong, needle_tasks, tiny_wire, rules, tmp_path):
    path = tmp_path / "e.jsonl"
    append_records(path, wrong[:1])
    jobs, _ = load_reflection_jobs([path], tiny_wire.name, max_rounds=5, max_per_task=2)
    with serve_endpoint(TakesOver(needle_tasks, tiny_wire)) as endpoint:
        log, _, _ = produce(endpoint.url, jobs, tiny_wire, rules, tmp_path / "reflect")
    whole = log.records[0].trajectory
    learned = fold_turns_into_prompt(whole, 1)
    assert learned.expanded_ids == whole.expanded_ids
    assert learned.frame_refs == whole.frame_refs
    assert learned.grids == whole.grids
    mask, before = np.array(learned.loss_mask), np.array(whole.loss_mask)
    first = whole.prompt.num_tokens + len(whole.turns[0].action.token_ids)
    assert mask[:first].sum() == 0
    np.testing.assert_array_equal(mask[first:], before[first:])
    sample = trajectory_to_sample(whole, tiny_wire, lambda ref: ref.digest, num_context_turns=1)
    weights = [m.get("weight") for m in sample["messages"] if m["role"] == "assistant"]
    assert weights == [0, *[None] * (len(whole.turns) - 1)]


def test_a_video_that_changed_is_found_before_the_expert_is_asked(
    wrong, needle_tasks, tiny_wire, rules, tmp_path
):
    path = tmp_path / "e.jsonl"
    append_records(path, wrong[:1])
    jobs, _ = load_reflection_jobs([path], tiny_wire.name, max_rounds=5, max_per_task=2)
    other = replace(jobs[0], task=replace(jobs[0].task, video=needle_tasks[-1].video))
    with serve_endpoint(TakesOver(needle_tasks, tiny_wire)) as endpoint:
        log, _, _ = produce(endpoint.url, [other], tiny_wire, rules, tmp_path / "reflect")
    assert log.records[0].trajectory.status is EpisodeStatus.FAILED
    assert "shows other frames" in log.records[0].trajectory.error
    assert not endpoint.requests


def test_every_episode_that_is_of_no_use_is_counted_by_why(wrong, tiny_wire, tmp_path):
    (one, *_), wire = wrong, tiny_wire.name
    played = one.trajectory
    right = replace(played, reward=replace(played.reward, accuracy=1.0))
    kinds = {
        "right already": right,
        "ended as truncated": replace(played, status=EpisodeStatus.TRUNCATED),
        "ended as failed": replace(played, status=EpisodeStatus.FAILED, turns=()),
        "not judged": replace(played, reward=None),
        "did not zoom": replace(played, turns=played.turns[1:]),
        "of another wire format": replace(played, wire="clean-000000000000"),
    }
    for reason, trajectory in kinds.items():
        assert exclusion_reason(replace(one, trajectory=trajectory), wire, 5) == reason
    path = tmp_path / "e.jsonl"
    append_records(path, [one, one, *(replace(one, trajectory=t) for t in kinds.values())])
    jobs, counts = load_reflection_jobs([path], wire, max_rounds=5, max_per_task=1)
    assert len(jobs) == 1
    assert counts == {"episodes": 8, "enough of the task": 1, **dict.fromkeys(kinds, 1)}


def test_a_policy_that_used_all_its_rounds_leaves_the_expert_two(wrong, tiny_wire, tmp_path):
    (one, *_) = wrong
    turns = (*[one.trajectory.turns[0]] * 4, one.trajectory.turns[1])
    path = tmp_path / "e.jsonl"
    append_records(path, [replace(one, trajectory=replace(one.trajectory, turns=turns))])
    jobs, _ = load_reflection_jobs([path], tiny_wire.name, max_rounds=5, max_per_task=1)
    assert len(jobs[0].prefix_turns) == 3


def test_files_that_are_no_episode_logs_are_named(tmp_path):
    with pytest.raises(UserError, match="no episode log at"):
        find_episode_logs([str(tmp_path)])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl is no episode log"):
        load_reflection_jobs([tmp_path / "metrics.jsonl"], "w", max_rounds=5, max_per_task=1)
