"""Whole episodes of an expert behind a real HTTP server, on real videos."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from tests.distill.oracle_server import OracleServer, count_turns, make_completion
from tests.rewards.fake_endpoint import FakeReply as Http
from tests.rewards.fake_endpoint import serve_endpoint
from vz_ray.config.distill import FilterConfig, TeacherConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.distill.chat_messages import TeacherPrompt
from vz_ray.distill.cost_ledger import CostLedger
from vz_ray.distill.distillation_log import DistillationLog
from vz_ray.distill.filters import find_fault
from vz_ray.distill.teacher_client import CostLimitReached, TeacherClient
from vz_ray.distill.teacher_runner import TeacherJob, TeacherRunner
from vz_ray.distill.zoom_patterns import ZoomPattern, classify_pattern
from vz_ray.env.trajectory import EpisodeStatus, ExternalAction, RejectedZoom, ZoomErrorKind
from vz_ray.utils.errors import UserError
from vz_ray.video.local_source import LocalFrameSource

CONFIG = TeacherConfig(
    model="oracle", base_url="http://127.0.0.1:9/v1", max_attempts=4, backoff_s=0.02,
    request_timeout_s=30, turn_timeout_s=90, episode_timeout_s=120, input_usd_per_mtok=10.0, output_usd_per_mtok=100.0,
)  # fmt: skip
REWARD = RewardConfig(max_zoom_frames=8)
KEEP = FilterConfig()


def produce(url: str, jobs, wire, rules, folder: Path, *, check=lambda: None, config=CONFIG, at_once=4):
    """Plays jobs to the end; the log, the account, and what was raised."""

    async def go():
        account = CostLedger(folder / "replies.jsonl", config.max_cost_usd)
        log = DistillationLog(folder / "exemplar.jsonl", {"expert": config.model})
        expert = TeacherClient(replace(config, base_url=url), account, check)
        raised = None
        with LocalFrameSource() as frames:
            studio = TeacherRunner(expert, wire, frames, rules, REWARD, TeacherPrompt("guide"), "exemplar")
            try:
                await studio.run_jobs(jobs, log, max_concurrent=at_once)
            except Exception as error:
                raised = error
            finally:
                await expert.close()
        return log, account, raised

    return asyncio.run(go())


def all_jobs(tasks, attempts=1):
    return [TeacherJob(task, sample) for task in tasks for sample in range(attempts)]


def test_an_oracle_behind_http_plays_right_and_well_formed_episodes(needle_tasks, tiny_wire, rules, tmp_path):
    with serve_endpoint(OracleServer(needle_tasks, tiny_wire)) as endpoint:
        log, account, raised = produce(endpoint.url, all_jobs(needle_tasks), tiny_wire, rules, tmp_path)
    assert raised is None
    assert len(log.records) == len(needle_tasks)
    turns = 0
    for record in log.records:
        assert find_fault(record, KEEP, 8) == ""
        assert all(isinstance(turn.action, ExternalAction) for turn in record.trajectory.turns)
        turns += len(record.trajectory.turns)
        several = ZoomPattern.PROGRESSIVE if record.task.kind == "deep" else ZoomPattern.CORRECTED
        zooms = len(record.task.extra["path"])
        assert classify_pattern(record.trajectory) is (ZoomPattern.DIRECT if zooms == 1 else several)
    assert len(endpoint.requests) == turns == account.totals.requests


def test_errors_on_the_way_change_nothing_but_the_number_of_requests(
    needle_tasks, tiny_wire, rules, tmp_path
):
    def now_and_then(number, body):
        bad = (Http(status=429, body=b"{}"), Http(status=500, body=b""), Http(hang_up=True), Http(body=b"{"))
        # One of each kind: were there more, one request could have all of them, and be given up.
        return bad[number // 3] if number % 3 == 0 and number < 12 else None

    with serve_endpoint(OracleServer(needle_tasks, tiny_wire, now_and_then)) as endpoint:
        log, account, raised = produce(endpoint.url, all_jobs(needle_tasks), tiny_wire, rules, tmp_path)
    assert raised is None
    assert all(find_fault(record, KEEP, 8) == "" for record in log.records)
    assert len(endpoint.requests) > account.totals.replies
    assert len(endpoint.requests) == account.totals.requests


NEVER = '<think>more</think><video_zoom>{"segment":[0,4],"fps":2}</video_zoom>'


@pytest.mark.parametrize(
    ("text", "status", "fault", "requests"),
    [
        (NEVER, EpisodeStatus.NO_ANSWER, "never stopped zooming", 5),
        (
            '<think>?</think><video_zoom>{"segment": [0, 4',
            EpisodeStatus.NO_ANSWER,
            "broken call in the last turn",
            5,
        ),
        ("", EpisodeStatus.NO_ANSWER, "no answer", 1),
        ("I do not know.", EpisodeStatus.NO_ANSWER, "no answer", 1),
        ("<think>a</think><answer>Z</answer>", EpisodeStatus.ANSWERED, "wrong answer", 1),
        ("<answer><|image_pad|></answer>", EpisodeStatus.FAILED, "failed: expert control token", 1),
    ],
    ids=["never stops zooming", "broken JSON", "empty", "no tags", "wrong", "control token"],
)
def test_an_expert_that_cannot_do_it_is_counted_and_not_kept(
    needle_tasks, tiny_wire, rules, tmp_path, text, status, fault, requests
):
    with serve_endpoint(lambda number, body: make_completion(text)) as endpoint:
        log, _, raised = produce(endpoint.url, all_jobs(needle_tasks[:1]), tiny_wire, rules, tmp_path)
    assert raised is None
    (record,) = log.records
    assert record.trajectory.status is status
    assert find_fault(record, KEEP, 8) == fault
    assert len(endpoint.requests) == requests


def test_a_broken_call_is_explained_to_the_expert_which_may_mend_it(needle_tasks, tiny_wire, rules, tmp_path):
    def broken_once(number, body):
        return (
            make_completion("<think>?</think><video_zoom>{segment: 0</video_zoom>")
            if not count_turns(body)
            else None
        )

    server = OracleServer(needle_tasks[:1], tiny_wire, broken_once)
    with serve_endpoint(server) as endpoint:
        log, _, _ = produce(endpoint.url, all_jobs(needle_tasks[:1]), tiny_wire, rules, tmp_path)
    (record,) = log.records
    first = record.trajectory.turns[0].zoom
    assert isinstance(first, RejectedZoom)
    assert first.kind is ZoomErrorKind.INVALID_JSON
    assert "not valid JSON" in str(endpoint.requests[1]["messages"][-1]["content"])


def test_what_is_in_the_log_is_not_played_again_and_what_failed_is(needle_tasks, tiny_wire, rules, tmp_path):
    first = all_jobs(needle_tasks)
    gone = Http(status=400, body=b"{}")
    first_task = needle_tasks[0].task_id

    def without_first(number, body):
        return gone if first_task in str(body["messages"][1]["content"][-1]) else None

    with serve_endpoint(OracleServer(needle_tasks, tiny_wire, without_first)) as endpoint:
        log, _, raised = produce(endpoint.url, first, tiny_wire, rules, tmp_path)
    assert raised is None
    assert [r.task.task_id for r in log.records if r.trajectory.status is EpisodeStatus.FAILED] == [
        first_task
    ]
    with serve_endpoint(OracleServer(needle_tasks, tiny_wire)) as endpoint:
        log, _, raised = produce(endpoint.url, first, tiny_wire, rules, tmp_path)
    assert raised is None
    assert {r.trajectory.status for r in log.records} == {EpisodeStatus.ANSWERED}
    again = next(r for r in log.records if r.task.task_id == first_task)
    assert len(endpoint.requests) == len(again.trajectory.turns)


def test_turns_that_were_paid_for_are_not_paid_for_again(needle_tasks, tiny_wire, rules, tmp_path):
    class Stop(Exception):
        pass

    asked = 0

    def after_three() -> None:
        nonlocal asked
        asked += 1
        if asked > 3:
            raise Stop

    jobs = all_jobs(needle_tasks)
    with serve_endpoint(OracleServer(needle_tasks, tiny_wire)) as endpoint:
        _, account, raised = produce(endpoint.url, jobs, tiny_wire, rules, tmp_path, check=after_three)
        assert isinstance(raised, Stop)
        assert len(endpoint.requests) == 3
        log, account, raised = produce(endpoint.url, jobs, tiny_wire, rules, tmp_path)
    assert raised is None
    assert len(endpoint.requests) == sum(len(r.trajectory.turns) for r in log.records)
    assert account.totals.reserved_usd == 0


def test_the_cost_limit_stops_playing_and_a_higher_one_goes_on(needle_tasks, tiny_wire, rules, tmp_path):
    jobs = all_jobs(needle_tasks)
    low, high = replace(CONFIG, max_cost_usd=0.1), replace(CONFIG, max_cost_usd=100.0)
    with serve_endpoint(OracleServer(needle_tasks, tiny_wire)) as endpoint:
        log, account, raised = produce(endpoint.url, jobs, tiny_wire, rules, tmp_path, config=low)
        assert isinstance(raised, CostLimitReached)
        assert len(log.records) < len(jobs)
        assert 0 < account.totals.cost_usd <= 0.1
        log, account, raised = produce(endpoint.url, jobs, tiny_wire, rules, tmp_path, config=high)
    assert raised is None
    assert len(log.records) == len(jobs)
    assert len(endpoint.requests) == sum(len(r.trajectory.turns) for r in log.records)
    assert account.totals.cost_usd == pytest.approx(0.015 * len(endpoint.requests))


def test_an_expert_that_only_fails_is_given_up(needle_tasks, tiny_wire, rules, tmp_path):
    quick = replace(CONFIG, max_attempts=1, max_consecutive_failures=3)
    with serve_endpoint(lambda number, body: Http(status=500, body=b"")) as endpoint:
        log, _, raised = produce(
            endpoint.url, all_jobs(needle_tasks), tiny_wire, rules, tmp_path, config=quick, at_once=1
        )
    assert isinstance(raised, UserError)
    assert "3 episodes in a row" in str(raised)
    assert len(log.records) == len(endpoint.requests) == 3


def test_an_episode_that_takes_too_long_fails_alone(needle_tasks, tiny_wire, rules, tmp_path):
    slow = needle_tasks[0].task_id

    def slowly(number, body):
        late = slow in str(body["messages"][1]["content"][-1])
        return replace(make_completion("late"), delay_s=4.0) if late else None

    short = replace(CONFIG, episode_timeout_s=3.0)
    with serve_endpoint(OracleServer(needle_tasks[:2], tiny_wire, slowly)) as endpoint:
        log, _, raised = produce(
            endpoint.url, all_jobs(needle_tasks[:2]), tiny_wire, rules, tmp_path, config=short
        )
    assert raised is None
    found = {r.task.task_id: r.trajectory for r in log.records}
    assert found[slow].status is EpisodeStatus.FAILED
    assert "Overdue" in found[slow].error
    assert found[needle_tasks[1].task_id].status is EpisodeStatus.ANSWERED


def test_an_unreadable_video_fails_its_own_episodes(needle_tasks, tiny_wire, rules, tmp_path):
    tasks = [replace(needle_tasks[0], video="nowhere.mp4"), needle_tasks[1]]
    with serve_endpoint(OracleServer(tasks, tiny_wire)) as endpoint:
        log, _, raised = produce(endpoint.url, all_jobs(tasks), tiny_wire, rules, tmp_path)
    assert raised is None
    assert sorted(str(r.trajectory.status) for r in log.records) == ["answered", "failed"]


def test_a_log_of_another_expert_is_refused(tmp_path):
    DistillationLog(tmp_path / "log.jsonl", {"stage": "exemplar", "expert": "one"})
    with pytest.raises(UserError, match=r"another expert \('one' there, 'two' now\)"):
        DistillationLog(tmp_path / "log.jsonl", {"stage": "exemplar", "expert": "two"})
