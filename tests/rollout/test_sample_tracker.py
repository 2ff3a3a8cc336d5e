"""Accepted once or dropped with a reason, whatever order things arrive in."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vz_ray.env.trajectory import EpisodeId
from vz_ray.rollout.sample_tracker import SampleTracker


def test_first_attempt_is_accepted_and_others_rejected():
    ledger = SampleTracker()
    first, _ = ledger.register(0, "t", 2)
    again = ledger.retry(first.sample_key)
    assert again == EpisodeId(0, "t", 0, attempt=1)
    assert ledger.accept(again)
    assert not ledger.accept(first)
    assert not ledger.accept(EpisodeId(0, "unknown", 0))
    assert ledger.rejected == {"duplicate": 1, "not registered": 1}
    assert ledger.pending == ((0, "t", 1),)


def test_discarded_sample_rejects_late_attempts():
    ledger = SampleTracker()
    (only,) = ledger.register(3, "t", 1)
    ledger.discard(only.sample_key, "video is damaged")
    assert ledger.discarded[only.sample_key] == "video is damaged"
    assert not ledger.accept(only)


def test_sample_is_registered_once():
    ledger = SampleTracker()
    ledger.register(0, "t", 1)
    with pytest.raises(ValueError, match="already registered"):
        ledger.register(0, "t", 1)


def test_step_with_pending_samples_cannot_be_closed():
    ledger = SampleTracker()
    (only,) = ledger.register(0, "t", 1)
    with pytest.raises(ValueError, match="1 samples are pending"):
        ledger.close_step(0)
    ledger.accept(only)
    ledger.close_step(0)
    assert ledger == SampleTracker()


events = st.lists(
    st.tuples(st.sampled_from(["accept", "retry", "drop"]), st.integers(0, 3), st.integers(0, 2))
)


@given(events)
def test_sample_is_in_exactly_one_state(happened):
    ledger = SampleTracker()
    owed = [id.sample_key for id in ledger.register(0, "t", 4)]
    taken = dict.fromkeys(owed, 0)
    for what, sample, attempt in happened:
        key = owed[sample]
        if what == "accept":
            taken[key] += ledger.accept(EpisodeId(*key, attempt=attempt))
        elif key in ledger.pending:
            ledger.retry(key) if what == "retry" else ledger.discard(key, "because")
    for key in owed:
        assert sum(key in book for book in (ledger.attempts, ledger.accepted, ledger.discarded)) == 1
        assert taken[key] == (key in ledger.accepted)
    assert SampleTracker.from_dict(json.loads(json.dumps(ledger.to_dict()))) == ledger


def test_reopened_steps_are_registered_again():
    ledger = SampleTracker()
    for iteration in range(3):
        first, second = ledger.register(iteration, "t", 2)
        ledger.accept(first)
        ledger.discard(second.sample_key, "slow")
    ledger.reopen(1)
    assert {key[0] for key in (*ledger.accepted, *ledger.discarded)} == {0}
    assert len(ledger.register(1, "t", 2)) == 2
