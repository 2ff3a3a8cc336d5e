"""An expert takes over from a policy that zoomed wrongly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.coldstart.distill.serving import OracleServer, said, text_of, turns_of
from tests.coldstart.distill.test_studio import produce
from tests.reward.endpoint import serving
from vz_ray.coldstart.distill.patterns import Pattern, pattern_of
from vz_ray.coldstart.distill.reflect import log_files, read_wrong, unfit
from vz_ray.coldstart.distill.select import fault_of, given_turns
from vz_ray.coldstart.distill.studio import Job
from vz_ray.config.distill import CurateConfig
from vz_ray.data.record import append_records
from vz_ray.data.sft_file import folded, sample_of
from vz_ray.episode.trajectory import Sampled, Sampling, Status, VersionSpan
from vz_ray.observe.errors import UserError

WRONG = '<think>there</think><video_zoom>{"segment":[0.00,2.00],"fps":2}</video_zoom>'


def sampled(turn):
    """The same turn as if the policy had sampled it."""
    ids = turn.action.token_ids
    action = Sampled(ids, (-0.1,) * len(ids), (VersionSpan(0, len(ids), 3),), Sampling(), "zoom")
    return replace(turn, action=action)


@pytest.fixture
def wrong(needle_tasks, tiny_wire, rules, tmp_path):
    """Episodes of a policy that zooms to the start and answers wrongly."""

    def misses(number, body):
        return said(WRONG if not turns_of(body) else "<think>x</think><answer>Z</answer>")

    with serving(misses) as endpoint:
        jobs = [Job(task, 0) for task in needle_tasks[:3]]
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
    jobs, counts = read_wrong(log_files([str(tmp_path / "episodes")]), tiny_wire.name, rounds=5, most=2)
    assert counts == {"episodes": 3}
    with serving(TakesOver(needle_tasks, tiny_wire)) as endpoint:
        log, account, raised = produce(endpoint.url, jobs, tiny_wire, rules, tmp_path / "reflect")
    assert raised is None
    assert len(log.records) == 3
    for record, before in zip(log.records, wrong, strict=True):
        trajectory = record.trajectory
        assert given_turns(record) == 1
        assert trajectory.turns[0].action == before.trajectory.turns[0].action
        assert trajectory.prompt == before.trajectory.prompt
        assert trajectory.turns[0].reply == before.trajectory.turns[0].reply
        assert fault_of(record, CurateConfig(), 8) == ""
        assert pattern_of(trajectory) in (Pattern.CORRECTED, Pattern.PROGRESSIVE)
    # The policy's own turns are repeated, not asked for.
    own = sum(len(r.trajectory.turns) - 1 for r in log.records)
    assert len(endpoint.requests) == own == account.spent.requests
    assert text_of(endpoint.requests[0]["messages"][0]).endswith("\nguide")


def test_the_policy_s_turns_are_read_and_not_learned_from(wrong, needle_tasks, tiny_wire, rules, tmp_path):
    path = tmp_path / "e.jsonl"
    append_records(path, wrong[:1])
    jobs, _ = read_wrong([path], tiny_wire.name, rounds=5, most=2)
    with serving(TakesOver(needle_tasks, tiny_wire)) as endpoint:
        log, _, _ = produce(endpoint.url, jobs, tiny_wire, rules, tmp_path / "reflect")
    whole = log.records[0].trajectory
    learned = folded(whole, 1)
    assert learned.expanded_ids == whole.expanded_ids
    assert learned.refs == whole.refs
    assert learned.grids == whole.grids
    mask, before = np.array(learned.loss_mask), np.array(whole.loss_mask)
    first = whole.prompt.length + len(whole.turns[0].action.token_ids)
    assert mask[:first].sum() == 0
    np.testing.assert_array_equal(mask[first:], before[first:])
    sample = sample_of(whole, tiny_wire, lambda ref: ref.digest, given=1)
    weights = [m.get("weight") for m in sample["messages"] if m["role"] == "assistant"]
    assert weights == [0, *[None] * (len(whole.turns) - 1)]


def test_a_video_that_changed_is_found_before_the_expert_is_asked(
    wrong, needle_tasks, tiny_wire, rules, tmp_path
):
    path = tmp_path / "e.jsonl"
    append_records(path, wrong[:1])
    jobs, _ = read_wrong([path], tiny_wire.name, rounds=5, most=2)
    other = replace(jobs[0], task=replace(jobs[0].task, video=needle_tasks[-1].video))
    with serving(TakesOver(needle_tasks, tiny_wire)) as endpoint:
        log, _, _ = produce(endpoint.url, [other], tiny_wire, rules, tmp_path / "reflect")
    assert log.records[0].trajectory.status is Status.FAILED
    assert "shows other frames" in log.records[0].trajectory.error
    assert not endpoint.requests


def test_every_episode_that_is_of_no_use_is_counted_by_why(wrong, tiny_wire, tmp_path):
    (one, *_), wire = wrong, tiny_wire.name
    played = one.trajectory
    right = replace(played, reward=replace(played.reward, accuracy=1.0))
    kinds = {
        "right already": right,
        "ended as truncated": replace(played, status=Status.TRUNCATED),
        "ended as failed": replace(played, status=Status.FAILED, turns=()),
        "not judged": replace(played, reward=None),
        "did not zoom": replace(played, turns=played.turns[1:]),
        "of another wire format": replace(played, wire="clean-000000000000"),
    }
    for reason, trajectory in kinds.items():
        assert unfit(replace(one, trajectory=trajectory), wire, 5) == reason
    path = tmp_path / "e.jsonl"
    append_records(path, [one, one, *(replace(one, trajectory=t) for t in kinds.values())])
    jobs, counts = read_wrong([path], wire, rounds=5, most=1)
    assert len(jobs) == 1
    assert counts == {"episodes": 8, "enough of the task": 1, **dict.fromkeys(kinds, 1)}


def test_a_policy_that_used_all_its_rounds_leaves_the_expert_two(wrong, tiny_wire, tmp_path):
    (one, *_) = wrong
    turns = (*[one.trajectory.turns[0]] * 4, one.trajectory.turns[1])
    path = tmp_path / "e.jsonl"
    append_records(path, [replace(one, trajectory=replace(one.trajectory, turns=turns))])
    jobs, _ = read_wrong([path], tiny_wire.name, rounds=5, most=1)
    assert len(jobs[0].given) == 3


def test_files_that_are_no_episode_logs_are_named(tmp_path):
    with pytest.raises(UserError, match="no episode log at"):
        log_files([str(tmp_path)])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl is no episode log"):
        read_wrong([tmp_path / "metrics.jsonl"], "w", rounds=5, most=1)
