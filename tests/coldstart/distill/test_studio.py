"""Whole episodes of an expert behind a real HTTP server, on real videos."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from tests.coldstart.distill.serving import OracleServer, said, turns_of
from tests.reward.endpoint import Reply as Http
from tests.reward.endpoint import serving
from vz_ray.coldstart.distill.account import Account
from vz_ray.coldstart.distill.chat import Guide
from vz_ray.coldstart.distill.expert import Expert, LimitReached
from vz_ray.coldstart.distill.log import PlayLog
from vz_ray.coldstart.distill.patterns import Pattern, pattern_of
from vz_ray.coldstart.distill.select import fault_of
from vz_ray.coldstart.distill.studio import Job, Studio
from vz_ray.config.distill import CurateConfig, ExpertConfig
from vz_ray.config.reward import RewardConfig
from vz_ray.episode.trajectory import Status, Written, ZoomFault, ZoomRefused
from vz_ray.observe.errors import UserError
from vz_ray.video.local import LocalFrames

CONFIG = ExpertConfig(
    model="oracle", base_url="http://127.0.0.1:9/v1", attempts=4, backoff_s=0.02,
    timeout_s=30, turn_s=90, episode_s=120, input_usd=10.0, output_usd=100.0,
)  # fmt: skip
REWARD = RewardConfig(max_zoom_frames=8)
KEEP = CurateConfig()


def produce(url: str, jobs, wire, rules, folder: Path, *, check=lambda: None, config=CONFIG, at_once=4):
    """Plays jobs to the end; the log, the account, and what was raised."""

    async def go():
        account = Account(folder / "replies.jsonl", config.limit_usd)
        log = PlayLog(folder / "exemplar.jsonl", {"expert": config.model})
        expert = Expert(replace(config, base_url=url), account, check)
        raised = None
        with LocalFrames() as frames:
            studio = Studio(expert, wire, frames, rules, REWARD, Guide("guide"), "exemplar")
            try:
                await studio.play_all(jobs, log, at_once=at_once)
            except Exception as error:
                raised = error
            finally:
                await expert.close()
        return log, account, raised

    return asyncio.run(go())


def all_jobs(tasks, attempts=1):
    return [Job(task, sample) for task in tasks for sample in range(attempts)]


def test_an_oracle_behind_http_plays_right_and_well_formed_episodes(needle_tasks, tiny_wire, rules, tmp_path):
    with serving(OracleServer(needle_tasks, tiny_wire)) as endpoint:
        log, account, raised = produce(endpoint.url, all_jobs(needle_tasks), tiny_wire, rules, tmp_path)
    assert raised is None
    assert len(log.records) == len(needle_tasks)
    turns = 0
    for record in log.records:
        assert fault_of(record, KEEP, 8) == ""
        assert all(isinstance(turn.action, Written) for turn in record.trajectory.turns)
        turns += len(record.trajectory.turns)
        several = Pattern.PROGRESSIVE if record.task.kind == "deep" else Pattern.CORRECTED
        zooms = len(record.task.extra["path"])
        assert pattern_of(record.trajectory) is (Pattern.DIRECT if zooms == 1 else several)
    assert len(endpoint.requests) == turns == account.spent.requests


def test_errors_on_the_way_change_nothing_but_the_number_of_requests(
    needle_tasks, tiny_wire, rules, tmp_path
):
    def now_and_then(number, body):
        bad = (Http(status=429, body=b"{}"), Http(status=500, body=b""), Http(hang_up=True), Http(body=b"{"))
        # One of each kind: were there more, one request could have all of them, and be given up.
        return bad[number // 3] if number % 3 == 0 and number < 12 else None

    with serving(OracleServer(needle_tasks, tiny_wire, now_and_then)) as endpoint:
        log, account, raised = produce(endpoint.url, all_jobs(needle_tasks), tiny_wire, rules, tmp_path)
    assert raised is None
    assert all(fault_of(record, KEEP, 8) == "" for record in log.records)
    assert len(endpoint.requests) > account.spent.replies
    assert len(endpoint.requests) == account.spent.requests


NEVER = '<think>more</think><video_zoom>{"segment":[0,4],"fps":2}</video_zoom>'


@pytest.mark.parametrize(
    ("text", "status", "fault", "requests"),
    [
        (NEVER, Status.NO_ANSWER, "never stopped zooming", 5),
        (
            '<think>?</think><video_zoom>{"segment": [0, 4',
            Status.NO_ANSWER,
            "broken call in the last turn",
            5,
        ),
        ("", Status.NO_ANSWER, "no answer", 1),
        ("I do not know.", Status.NO_ANSWER, "no answer", 1),
        ("<think>a</think><answer>Z</answer>", Status.ANSWERED, "wrong answer", 1),
        ("<answer><|image_pad|></answer>", Status.FAILED, "failed: expert control token", 1),
    ],
    ids=["never stops zooming", "broken JSON", "empty", "no tags", "wrong", "control token"],
)
def test_an_expert_that_cannot_do_it_is_counted_and_not_kept(
    needle_tasks, tiny_wire, rules, tmp_path, text, status, fault, requests
):
    with serving(lambda number, body: said(text)) as endpoint:
        log, _, raised = produce(endpoint.url, all_jobs(needle_tasks[:1]), tiny_wire, rules, tmp_path)
    assert raised is None
    (record,) = log.records
    assert record.trajectory.status is status
    assert fault_of(record, KEEP, 8) == fault
    assert len(endpoint.requests) == requests


def test_a_broken_call_is_explained_to_the_expert_which_may_mend_it(needle_tasks, tiny_wire, rules, tmp_path):
    def broken_once(number, body):
        return said("<think>?</think><video_zoom>{segment: 0</video_zoom>") if not turns_of(body) else None

    server = OracleServer(needle_tasks[:1], tiny_wire, broken_once)
    with serving(server) as endpoint:
        log, _, _ = produce(endpoint.url, all_jobs(needle_tasks[:1]), tiny_wire, rules, tmp_path)
    (record,) = log.records
    first = record.trajectory.turns[0].zoom
    assert isinstance(first, ZoomRefused)
    assert first.fault is ZoomFault.BROKEN_JSON
    assert "not valid JSON" in str(endpoint.requests[1]["messages"][-1]["content"])


def test_what_is_in_the_log_is_not_played_again_and_what_failed_is(needle_tasks, tiny_wire, rules, tmp_path):
    first = all_jobs(needle_tasks)
    gone = Http(status=400, body=b"{}")
    first_task = needle_tasks[0].task_id

    def without_first(number, body):
        return gone if first_task in str(body["messages"][1]["content"][-1]) else None

    with serving(OracleServer(needle_tasks, tiny_wire, without_first)) as endpoint:
        log, _, raised = produce(endpoint.url, first, tiny_wire, rules, tmp_path)
    assert raised is None
    assert [r.task.task_id for r in log.records if r.trajectory.status is Status.FAILED] == [first_task]
    with serving(OracleServer(needle_tasks, tiny_wire)) as endpoint:
        log, _, raised = produce(endpoint.url, first, tiny_wire, rules, tmp_path)
    assert raised is None
    assert {r.trajectory.status for r in log.records} == {Status.ANSWERED}
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
    with serving(OracleServer(needle_tasks, tiny_wire)) as endpoint:
        _, account, raised = produce(endpoint.url, jobs, tiny_wire, rules, tmp_path, check=after_three)
        assert isinstance(raised, Stop)
        assert len(endpoint.requests) == 3
        log, account, raised = produce(endpoint.url, jobs, tiny_wire, rules, tmp_path)
    assert raised is None
    assert len(endpoint.requests) == sum(len(r.trajectory.turns) for r in log.records)
    assert account.spent.unsure_usd == 0


def test_the_cost_limit_stops_playing_and_a_higher_one_goes_on(needle_tasks, tiny_wire, rules, tmp_path):
    jobs = all_jobs(needle_tasks)
    low, high = replace(CONFIG, limit_usd=0.1), replace(CONFIG, limit_usd=100.0)
    with serving(OracleServer(needle_tasks, tiny_wire)) as endpoint:
        log, account, raised = produce(endpoint.url, jobs, tiny_wire, rules, tmp_path, config=low)
        assert isinstance(raised, LimitReached)
        assert len(log.records) < len(jobs)
        assert 0 < account.spent.usd <= 0.1
        log, account, raised = produce(endpoint.url, jobs, tiny_wire, rules, tmp_path, config=high)
    assert raised is None
    assert len(log.records) == len(jobs)
    assert len(endpoint.requests) == sum(len(r.trajectory.turns) for r in log.records)
    assert account.spent.usd == pytest.approx(0.015 * len(endpoint.requests))


def test_an_expert_that_only_fails_is_given_up(needle_tasks, tiny_wire, rules, tmp_path):
    quick = replace(CONFIG, attempts=1, give_up_after=3)
    with serving(lambda number, body: Http(status=500, body=b"")) as endpoint:
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
        return replace(said("late"), after_s=4.0) if late else None

    short = replace(CONFIG, episode_s=3.0)
    with serving(OracleServer(needle_tasks[:2], tiny_wire, slowly)) as endpoint:
        log, _, raised = produce(
            endpoint.url, all_jobs(needle_tasks[:2]), tiny_wire, rules, tmp_path, config=short
        )
    assert raised is None
    found = {r.task.task_id: r.trajectory for r in log.records}
    assert found[slow].status is Status.FAILED
    assert "Overdue" in found[slow].error
    assert found[needle_tasks[1].task_id].status is Status.ANSWERED


def test_an_unreadable_video_fails_its_own_episodes(needle_tasks, tiny_wire, rules, tmp_path):
    tasks = [replace(needle_tasks[0], video="nowhere.mp4"), needle_tasks[1]]
    with serving(OracleServer(tasks, tiny_wire)) as endpoint:
        log, _, raised = produce(endpoint.url, all_jobs(tasks), tiny_wire, rules, tmp_path)
    assert raised is None
    assert sorted(str(r.trajectory.status) for r in log.records) == ["answered", "failed"]


def test_a_log_of_another_expert_is_refused(tmp_path):
    PlayLog(tmp_path / "log.jsonl", {"stage": "exemplar", "expert": "one"})
    with pytest.raises(UserError, match=r"another expert \('one' there, 'two' now\)"):
        PlayLog(tmp_path / "log.jsonl", {"stage": "exemplar", "expert": "two"})
