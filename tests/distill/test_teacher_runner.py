"""Teacher episodes against a real HTTP server, on real videos."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.distill.oracle_server import OracleServer, count_turns, make_completion
from tests.distill.teacher_episodes import CONFIG, make_jobs, run_teacher_jobs
from tests.rewards.fake_endpoint import FakeReply, serve_endpoint
from vz_ray.config.distill import FilterConfig
from vz_ray.distill.filters import find_fault
from vz_ray.distill.teacher_client import CostLimitReached
from vz_ray.distill.teacher_runner import DistillationLog
from vz_ray.distill.zoom_patterns import ZoomPattern, classify_pattern
from vz_ray.env.trajectory import EpisodeStatus, ExternalAction, RejectedZoom, ZoomErrorKind
from vz_ray.utils.errors import UserError

FILTER = FilterConfig()


def test_oracle_teacher_answers_correctly(needle_tasks, chat_format, episode_config, tmp_path):
    with serve_endpoint(OracleServer(needle_tasks, chat_format)) as endpoint:
        log, ledger, raised = run_teacher_jobs(
            endpoint.url, make_jobs(needle_tasks), chat_format, episode_config, tmp_path
        )
    assert raised is None
    assert len(log.records) == len(needle_tasks)
    turns = 0
    for record in log.records:
        assert find_fault(record, FILTER, 8) == ""
        assert all(isinstance(turn.action, ExternalAction) for turn in record.trajectory.turns)
        turns += len(record.trajectory.turns)
        multiple = ZoomPattern.PROGRESSIVE if record.task.kind == "deep" else ZoomPattern.CORRECTED
        zooms = len(record.task.extra["path"])
        assert classify_pattern(record.trajectory) is (ZoomPattern.DIRECT if zooms == 1 else multiple)
    assert len(endpoint.requests) == turns == ledger.totals.requests


def test_transient_errors_only_add_requests(needle_tasks, chat_format, episode_config, tmp_path):
    def fail_sometimes(number, body):
        failures = (
            FakeReply(status=429, body=b"{}"),
            FakeReply(status=500, body=b""),
            FakeReply(hang_up=True),
            FakeReply(body=b"{"),
        )
        # One failure of each kind, so that no request fails max_attempts times.
        return failures[number // 3] if number % 3 == 0 and number < 12 else None

    with serve_endpoint(OracleServer(needle_tasks, chat_format, fail_sometimes)) as endpoint:
        log, ledger, raised = run_teacher_jobs(
            endpoint.url, make_jobs(needle_tasks), chat_format, episode_config, tmp_path
        )
    assert raised is None
    assert all(find_fault(record, FILTER, 8) == "" for record in log.records)
    assert len(endpoint.requests) > ledger.totals.replies
    assert len(endpoint.requests) == ledger.totals.requests


ALWAYS_ZOOM = '<think>more</think><video_zoom>{"segment":[0,4],"fps":2}</video_zoom>'


@pytest.mark.parametrize(
    ("text", "status", "fault", "requests"),
    [
        (ALWAYS_ZOOM, EpisodeStatus.NO_ANSWER, "zoomed until the last round", 5),
        (
            '<think>?</think><video_zoom>{"segment": [0, 4',
            EpisodeStatus.NO_ANSWER,
            "invalid call in the last turn",
            5,
        ),
        ("", EpisodeStatus.NO_ANSWER, "no answer", 1),
        ("I do not know.", EpisodeStatus.NO_ANSWER, "no answer", 1),
        ("<think>a</think><answer>Z</answer>", EpisodeStatus.ANSWERED, "wrong answer", 1),
        ("<answer><|image_pad|></answer>", EpisodeStatus.FAILED, "failed: teacher control token", 1),
    ],
    ids=["always zooms", "broken JSON", "empty", "no tags", "wrong", "control token"],
)
def test_bad_teacher_episode_is_faulted(
    needle_tasks, chat_format, episode_config, tmp_path, text, status, fault, requests
):
    with serve_endpoint(lambda number, body: make_completion(text)) as endpoint:
        log, _, raised = run_teacher_jobs(
            endpoint.url, make_jobs(needle_tasks[:1]), chat_format, episode_config, tmp_path
        )
    assert raised is None
    (record,) = log.records
    assert record.trajectory.status is status
    assert find_fault(record, FILTER, 8) == fault
    assert len(endpoint.requests) == requests


def test_teacher_can_correct_invalid_call(needle_tasks, chat_format, episode_config, tmp_path):
    def broken_once(number, body):
        return (
            make_completion("<think>?</think><video_zoom>{segment: 0</video_zoom>") if not count_turns(body) else None
        )

    server = OracleServer(needle_tasks[:1], chat_format, broken_once)
    with serve_endpoint(server) as endpoint:
        log, _, _ = run_teacher_jobs(endpoint.url, make_jobs(needle_tasks[:1]), chat_format, episode_config, tmp_path)
    (record,) = log.records
    first = record.trajectory.turns[0].zoom
    assert isinstance(first, RejectedZoom)
    assert first.kind is ZoomErrorKind.INVALID_JSON
    assert "not valid JSON" in str(endpoint.requests[1]["messages"][-1]["content"])


def test_only_failed_episodes_are_rerun(needle_tasks, chat_format, episode_config, tmp_path):
    first = make_jobs(needle_tasks)
    bad_request = FakeReply(status=400, body=b"{}")
    first_task = needle_tasks[0].task_id

    def without_first(number, body):
        return bad_request if first_task in str(body["messages"][1]["content"][-1]) else None

    with serve_endpoint(OracleServer(needle_tasks, chat_format, without_first)) as endpoint:
        log, _, raised = run_teacher_jobs(endpoint.url, first, chat_format, episode_config, tmp_path)
    assert raised is None
    assert [r.task.task_id for r in log.records if r.trajectory.status is EpisodeStatus.FAILED] == [first_task]
    with serve_endpoint(OracleServer(needle_tasks, chat_format)) as endpoint:
        log, _, raised = run_teacher_jobs(endpoint.url, first, chat_format, episode_config, tmp_path)
    assert raised is None
    assert {r.trajectory.status for r in log.records} == {EpisodeStatus.ANSWERED}
    second_record = next(r for r in log.records if r.task.task_id == first_task)
    assert len(endpoint.requests) == len(second_record.trajectory.turns)


def test_resumed_run_reuses_paid_turns(needle_tasks, chat_format, episode_config, tmp_path):
    class Stop(Exception):
        pass

    num_checks = 0

    def stop_after_three() -> None:
        nonlocal num_checks
        num_checks += 1
        if num_checks > 3:
            raise Stop

    jobs = make_jobs(needle_tasks)
    with serve_endpoint(OracleServer(needle_tasks, chat_format)) as endpoint:
        _, ledger, raised = run_teacher_jobs(
            endpoint.url, jobs, chat_format, episode_config, tmp_path, check=stop_after_three
        )
        assert isinstance(raised, Stop)
        assert len(endpoint.requests) == 3
        log, ledger, raised = run_teacher_jobs(endpoint.url, jobs, chat_format, episode_config, tmp_path)
    assert raised is None
    assert len(endpoint.requests) == sum(len(r.trajectory.turns) for r in log.records)
    assert ledger.totals.reserved_usd == 0


def test_higher_budget_resumes_run(needle_tasks, chat_format, episode_config, tmp_path):
    jobs = make_jobs(needle_tasks)
    low, high = replace(CONFIG, max_cost_usd=0.1), replace(CONFIG, max_cost_usd=100.0)
    with serve_endpoint(OracleServer(needle_tasks, chat_format)) as endpoint:
        log, ledger, raised = run_teacher_jobs(endpoint.url, jobs, chat_format, episode_config, tmp_path, config=low)
        assert isinstance(raised, CostLimitReached)
        assert len(log.records) < len(jobs)
        assert 0 < ledger.totals.cost_usd <= 0.1
        log, ledger, raised = run_teacher_jobs(endpoint.url, jobs, chat_format, episode_config, tmp_path, config=high)
    assert raised is None
    assert len(log.records) == len(jobs)
    assert len(endpoint.requests) == sum(len(r.trajectory.turns) for r in log.records)
    assert ledger.totals.cost_usd == pytest.approx(0.015 * len(endpoint.requests))


def test_consecutive_failures_stop_run(needle_tasks, chat_format, episode_config, tmp_path):
    quick = replace(CONFIG, max_attempts=1, max_consecutive_failures=3)
    with serve_endpoint(lambda number, body: FakeReply(status=500, body=b"")) as endpoint:
        log, _, raised = run_teacher_jobs(
            endpoint.url,
            make_jobs(needle_tasks),
            chat_format,
            episode_config,
            tmp_path,
            config=quick,
            max_concurrent=1,
        )
    assert isinstance(raised, UserError)
    assert "3 episodes in a row" in str(raised)
    assert len(log.records) == len(endpoint.requests) == 3


def test_episode_timeout_fails_one_episode(needle_tasks, chat_format, episode_config, tmp_path):
    slow = needle_tasks[0].task_id

    def slowly(number, body):
        is_slow = slow in str(body["messages"][1]["content"][-1])
        return replace(make_completion("late"), delay_s=4.0) if is_slow else None

    short = replace(CONFIG, episode_timeout_s=3.0)
    with serve_endpoint(OracleServer(needle_tasks[:2], chat_format, slowly)) as endpoint:
        log, _, raised = run_teacher_jobs(
            endpoint.url, make_jobs(needle_tasks[:2]), chat_format, episode_config, tmp_path, config=short
        )
    assert raised is None
    trajectories = {r.task.task_id: r.trajectory for r in log.records}
    assert trajectories[slow].status is EpisodeStatus.FAILED
    assert "StepTimeout" in trajectories[slow].error
    assert trajectories[needle_tasks[1].task_id].status is EpisodeStatus.ANSWERED


def test_unreadable_video_fails_its_episodes(needle_tasks, chat_format, episode_config, tmp_path):
    tasks = [replace(needle_tasks[0], video="missing.mp4"), needle_tasks[1]]
    with serve_endpoint(OracleServer(tasks, chat_format)) as endpoint:
        log, _, raised = run_teacher_jobs(endpoint.url, make_jobs(tasks), chat_format, episode_config, tmp_path)
    assert raised is None
    assert sorted(str(r.trajectory.status) for r in log.records) == ["answered", "failed"]


def test_log_of_other_teacher_is_rejected(tmp_path):
    DistillationLog(tmp_path / "log.jsonl", {"stage": "exemplar", "teacher": "a"})
    with pytest.raises(UserError, match=r"another teacher \('a' there, 'b' now\)"):
        DistillationLog(tmp_path / "log.jsonl", {"stage": "exemplar", "teacher": "b"})
