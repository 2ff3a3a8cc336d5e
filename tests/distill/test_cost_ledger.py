"""What was paid for is known to the next process, however this one ended."""

from __future__ import annotations

import pytest

from vz_ray.distill.cost_ledger import CostLedger, TeacherReply

REPLY = TeacherReply("<answer>A</answer>", "stop", 100, 10, cost_usd=0.25)


def test_replies_and_costs_come_back(tmp_path):
    account = CostLedger(tmp_path / "replies.jsonl")
    account.reserve("a", 1.0)
    account.record_reply("a", REPLY)
    account.reserve("b", 0.5)
    account.record_rejection("b")
    again = CostLedger(tmp_path / "replies.jsonl")
    assert again.get_reply("a") == REPLY
    assert again.get_reply("b") is None
    assert again.totals == account.totals
    assert (again.totals.cost_usd, again.totals.reserved_usd) == (0.25, 0.0)
    assert (again.totals.requests, again.totals.replies, again.totals.rejected) == (2, 1, 1)


def test_a_request_on_its_way_when_the_process_died_counts_at_its_most(tmp_path):
    CostLedger(tmp_path / "replies.jsonl").reserve("a", 1.5)
    again = CostLedger(tmp_path / "replies.jsonl", limit_usd=2.0)
    assert again.totals.reserved_usd == 1.5
    assert not again.has_pending_requests
    assert again.can_afford(0.5)
    assert not again.can_afford(0.6)
    again.reserve("a", 0.5)
    again.record_reply("a", REPLY)
    assert again.totals.cost_usd + again.totals.reserved_usd == pytest.approx(1.75)


def test_a_half_written_line_is_cut_off(tmp_path):
    path = tmp_path / "replies.jsonl"
    account = CostLedger(path)
    account.reserve("a", 1.0)
    account.record_reply("a", REPLY)
    with path.open("ab") as file:
        file.write(b'{"asked": "b", "us')
    again = CostLedger(path)
    again.reserve("c", 1.0)
    assert CostLedger(path).totals.requests == 2


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "replies.jsonl"
    path.write_text('{"asked": "a", "usd": 1}\nrubbish\n')
    with pytest.raises(ValueError, match=r"replies\.jsonl, line 2"):
        CostLedger(path)


def test_requests_under_way_are_kept_back_and_given_free_when_they_cost_less(tmp_path):
    account = CostLedger(tmp_path / "replies.jsonl", limit_usd=2.0)
    account.reserve("a", 1.5)
    assert not account.can_afford(1.0)
    assert account.has_pending_requests
    account.record_reply("a", REPLY)
    assert account.can_afford(1.0)
    assert not account.has_pending_requests
