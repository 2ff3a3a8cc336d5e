"""Accepted once or dropped with a reason, whatever order things arrive in."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vz_ray.episode.trajectory import EpisodeId
from vz_ray.rollout.ledger import Ledger


def test_the_first_attempt_to_arrive_is_taken_and_the_rest_are_refused():
    ledger = Ledger()
    first, _ = ledger.owe(0, "t", 2)
    again = ledger.retry(first.owed)
    assert again == EpisodeId(0, "t", 0, attempt=1)
    assert ledger.accept(again)
    assert not ledger.accept(first)
    assert not ledger.accept(EpisodeId(0, "unknown", 0))
    assert ledger.refused == {"duplicate": 1, "not owed": 1}
    assert ledger.owed == ((0, "t", 1),)


def test_a_dropped_sample_keeps_its_reason_and_refuses_late_arrivals():
    ledger = Ledger()
    (only,) = ledger.owe(3, "t", 1)
    ledger.drop(only.owed, "video is damaged")
    assert ledger.dropped[only.owed] == "video is damaged"
    assert not ledger.accept(only)


def test_nothing_is_owed_twice():
    ledger = Ledger()
    ledger.owe(0, "t", 1)
    with pytest.raises(ValueError, match="already in the ledger"):
        ledger.owe(0, "t", 1)


def test_an_iteration_with_debts_cannot_be_closed():
    ledger = Ledger()
    (only,) = ledger.owe(0, "t", 1)
    with pytest.raises(ValueError, match="1 samples owed"):
        ledger.close(0)
    ledger.accept(only)
    ledger.close(0)
    assert ledger == Ledger()


events = st.lists(
    st.tuples(st.sampled_from(["accept", "retry", "drop"]), st.integers(0, 3), st.integers(0, 2))
)


@given(events)
def test_every_sample_is_in_exactly_one_book_after_any_events(happened):
    ledger = Ledger()
    owed = [id.owed for id in ledger.owe(0, "t", 4)]
    taken = dict.fromkeys(owed, 0)
    for what, sample, attempt in happened:
        key = owed[sample]
        if what == "accept":
            taken[key] += ledger.accept(EpisodeId(*key, attempt=attempt))
        elif key in ledger.owed:
            ledger.retry(key) if what == "retry" else ledger.drop(key, "because")
    for key in owed:
        assert sum(key in book for book in (ledger.attempts, ledger.accepted, ledger.dropped)) == 1
        assert taken[key] == (key in ledger.accepted)
    assert Ledger.from_dict(json.loads(json.dumps(ledger.to_dict()))) == ledger


def test_iterations_that_are_played_again_are_owed_anew():
    ledger = Ledger()
    for iteration in range(3):
        first, second = ledger.owe(iteration, "t", 2)
        ledger.accept(first)
        ledger.drop(second.owed, "slow")
    ledger.reopen(1)
    assert {key[0] for key in (*ledger.accepted, *ledger.dropped)} == {0}
    assert len(ledger.owe(1, "t", 2)) == 2
