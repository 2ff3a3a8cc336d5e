"""What was paid for is known to the next process, however this one ended."""

from __future__ import annotations

import pytest

from vz_ray.coldstart.distill.account import Account, Reply

REPLY = Reply("<answer>A</answer>", "stop", 100, 10, usd=0.25)


def test_replies_and_costs_come_back(tmp_path):
    account = Account(tmp_path / "replies.jsonl")
    account.ask("a", 1.0)
    account.replied("a", REPLY)
    account.ask("b", 0.5)
    account.refuse("b")
    again = Account(tmp_path / "replies.jsonl")
    assert again.reply("a") == REPLY
    assert again.reply("b") is None
    assert again.spent == account.spent
    assert (again.spent.usd, again.spent.unsure_usd) == (0.25, 0.0)
    assert (again.spent.requests, again.spent.replies, again.spent.refused) == (2, 1, 1)


def test_a_request_on_its_way_when_the_process_died_counts_at_its_most(tmp_path):
    Account(tmp_path / "replies.jsonl").ask("a", 1.5)
    again = Account(tmp_path / "replies.jsonl", limit_usd=2.0)
    assert again.spent.unsure_usd == 1.5
    assert not again.may_yet
    assert again.allows(0.5)
    assert not again.allows(0.6)
    again.ask("a", 0.5)
    again.replied("a", REPLY)
    assert again.spent.usd + again.spent.unsure_usd == pytest.approx(1.75)


def test_a_half_written_line_is_cut_off(tmp_path):
    path = tmp_path / "replies.jsonl"
    account = Account(path)
    account.ask("a", 1.0)
    account.replied("a", REPLY)
    with path.open("ab") as file:
        file.write(b'{"asked": "b", "us')
    again = Account(path)
    again.ask("c", 1.0)
    assert Account(path).spent.requests == 2


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "replies.jsonl"
    path.write_text('{"asked": "a", "usd": 1}\nrubbish\n')
    with pytest.raises(ValueError, match=r"replies\.jsonl, line 2"):
        Account(path)


def test_requests_under_way_are_kept_back_and_given_free_when_they_cost_less(tmp_path):
    account = Account(tmp_path / "replies.jsonl", limit_usd=2.0)
    account.ask("a", 1.5)
    assert not account.allows(1.0)
    assert account.may_yet
    account.replied("a", REPLY)
    assert account.allows(1.0)
    assert not account.may_yet
