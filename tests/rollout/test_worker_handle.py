"""State transitions of a worker handle."""

from __future__ import annotations

from itertools import product

import pytest

from vz_ray.rollout.worker_handle import InvalidTransitionError, WorkerEvent, WorkerState, next_state

S, E = WorkerState, WorkerEvent

EXPECTED = {
    (S.STARTING, E.STARTED): S.SYNCING,
    (S.STARTING, E.DRAIN): S.DEAD,
    (S.STARTING, E.DIED): S.DEAD,
    (S.SYNCING, E.SYNCED): S.READY,
    (S.SYNCING, E.DRAIN): S.DEAD,
    (S.SYNCING, E.DIED): S.DEAD,
    (S.READY, E.PUBLISH): S.SYNCING,
    (S.READY, E.SLEEP): S.ASLEEP,
    (S.ASLEEP, E.PUBLISH): S.SYNCING,
    (S.ASLEEP, E.DRAIN): S.DEAD,
    (S.ASLEEP, E.DIED): S.DEAD,
    (S.READY, E.DRAIN): S.DRAINING,
    (S.READY, E.DIED): S.DEAD,
    (S.DRAINING, E.DRAIN): S.DRAINING,
    (S.DRAINING, E.EMPTY): S.DEAD,
    (S.DRAINING, E.DIED): S.DEAD,
    (S.DEAD, E.DIED): S.DEAD,
}


@pytest.mark.parametrize(("state", "event"), list(product(S, E)))
def test_transition_table_is_complete(state: WorkerState, event: WorkerEvent) -> None:
    if (state, event) in EXPECTED:
        assert next_state(state, event) is EXPECTED[state, event]
    else:
        with pytest.raises(InvalidTransitionError, match=f"{state} cannot have event {event}"):
            next_state(state, event)


def test_dead_state_is_final() -> None:
    reached = {next_state(S.DEAD, event) for event in E if (S.DEAD, event) in EXPECTED}
    assert reached == {S.DEAD}


def test_ready_follows_only_syncing() -> None:
    sources = {state for (state, _), target in EXPECTED.items() if target is S.READY}
    assert sources == {S.SYNCING}
