"""Cost ledger across processes."""

from __future__ import annotations

import pytest

from vz_ray.distill.cost_ledger import CostLedger, TeacherReply

REPLY = TeacherReply("<answer>A</answer>", "stop", 100, 10, cost_usd=0.25)


def test_replies_and_costs_are_reloaded(tmp_path):
    ledger = CostLedger(tmp_path / "replies.jsonl")
    ledger.reserve("a", 1.0)
    ledger.record_reply("a", REPLY)
    ledger.reserve("b", 0.5)
    ledger.record_rejection("b")
    reopened = CostLedger(tmp_path / "replies.jsonl")
    assert reopened.get_reply("a") == REPLY
    assert reopened.get_reply("b") is None
    assert reopened.totals == ledger.totals
    assert (reopened.totals.cost_usd, reopened.totals.reserved_usd) == (0.25, 0.0)
    assert (reopened.totals.requests, reopened.totals.replies, reopened.totals.rejected) == (2, 1, 1)


def test_pending_request_counts_at_maximum_after_crash(tmp_path):
    CostLedger(tmp_path / "replies.jsonl").reserve("a", 1.5)
    reopened = CostLedger(tmp_path / "replies.jsonl", max_cost_usd=2.0)
    assert reopened.totals.reserved_usd == 1.5
    assert not reopened.has_pending_requests
    assert reopened.can_afford(0.5)
    assert not reopened.can_afford(0.6)
    reopened.reserve("a", 0.5)
    reopened.record_reply("a", REPLY)
    assert reopened.totals.cost_usd + reopened.totals.reserved_usd == pytest.approx(1.75)


def test_partial_last_line_is_truncated(tmp_path):
    path = tmp_path / "replies.jsonl"
    ledger = CostLedger(path)
    ledger.reserve("a", 1.0)
    ledger.record_reply("a", REPLY)
    with path.open("ab") as file:
        file.write(b'{"reserved": "b", "us')
    reopened = CostLedger(path)
    reopened.reserve("c", 1.0)
    assert CostLedger(path).totals.requests == 2


def test_invalid_line_is_reported(tmp_path):
    path = tmp_path / "replies.jsonl"
    path.write_text('{"reserved": "a", "usd": 1}\nrubbish\n')
    with pytest.raises(ValueError, match=r"replies\.jsonl, line 2"):
        CostLedger(path)


def test_reply_releases_reservation(tmp_path):
    ledger = CostLedger(tmp_path / "replies.jsonl", max_cost_usd=2.0)
    ledger.reserve("a", 1.5)
    assert not ledger.can_afford(1.0)
    assert ledger.has_pending_requests
    ledger.record_reply("a", REPLY)
    assert ledger.can_afford(1.0)
    assert not ledger.has_pending_requests
