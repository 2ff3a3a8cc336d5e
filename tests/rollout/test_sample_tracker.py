"""Exactly-once acceptance of samples, for any order of events."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vz_ray.env.trajectory import EpisodeId
from vz_ray.rollout.sample_tracker import SampleTracker


def test_first_attempt_is_accepted_and_others_rejected():
    tracker = SampleTracker()
    first, _ = tracker.register(0, "t", 2)
    retry = tracker.retry(first.sample_key)
    assert retry == EpisodeId(0, "t", 0, attempt=1)
    assert tracker.accept(retry)
    assert not tracker.accept(first)
    assert not tracker.accept(EpisodeId(0, "unknown", 0))
    assert tracker.rejected == {"duplicate": 1, "not registered": 1}
    assert tracker.pending == ((0, "t", 1),)


def test_discarded_sample_rejects_late_attempts():
    tracker = SampleTracker()
    (sample,) = tracker.register(3, "t", 1)
    tracker.discard(sample.sample_key, "video is damaged")
    assert tracker.discarded[sample.sample_key] == "video is damaged"
    assert not tracker.accept(sample)


def test_sample_is_registered_once():
    tracker = SampleTracker()
    tracker.register(0, "t", 1)
    with pytest.raises(ValueError, match="already registered"):
        tracker.register(0, "t", 1)


def test_step_with_pending_samples_cannot_be_closed():
    tracker = SampleTracker()
    (sample,) = tracker.register(0, "t", 1)
    with pytest.raises(ValueError, match="1 samples are pending"):
        tracker.close_step(0)
    tracker.accept(sample)
    tracker.close_step(0)
    assert tracker == SampleTracker()


events = st.lists(st.tuples(st.sampled_from(["accept", "retry", "discard"]), st.integers(0, 3), st.integers(0, 2)))


@given(events)
def test_sample_is_in_exactly_one_state(sequence):
    tracker = SampleTracker()
    keys = [id.sample_key for id in tracker.register(0, "t", 4)]
    num_accepted = dict.fromkeys(keys, 0)
    for event, sample, attempt in sequence:
        key = keys[sample]
        if event == "accept":
            num_accepted[key] += tracker.accept(EpisodeId(*key, attempt=attempt))
        elif key in tracker.pending:
            tracker.retry(key) if event == "retry" else tracker.discard(key, "reason")
    for key in keys:
        assert sum(key in records for records in (tracker.attempts, tracker.accepted, tracker.discarded)) == 1
        assert num_accepted[key] == (key in tracker.accepted)
    assert SampleTracker.from_dict(json.loads(json.dumps(tracker.to_dict()))) == tracker


def test_reopened_steps_are_registered_again():
    tracker = SampleTracker()
    for step in range(3):
        first, second = tracker.register(step, "t", 2)
        tracker.accept(first)
        tracker.discard(second.sample_key, "slow")
    tracker.reopen(1)
    assert {key[0] for key in (*tracker.accepted, *tracker.discarded)} == {0}
    assert len(tracker.register(1, "t", 2)) == 2
