"""What a rollout worker may be, and what can happen to it. Pure.

    starting --started--> syncing --synced--> ready --drain--> draining --empty--> dead
                             ^------publish-----'
    every state --died--> dead; starting and syncing --drain--> dead (there is nothing to finish)

Only a ready worker gets new episodes. A worker is ready only with the current
weights, and there is no way back from dead: whoever replaces it has a new name.
"""

from __future__ import annotations

from enum import StrEnum


class WorkerState(StrEnum):
    STARTING = "starting"
    """Its engine loads."""
    SYNCING = "syncing"
    """It gets weights; episodes that it plays stand still."""
    READY = "ready"
    """It plays, and takes new episodes."""
    DRAINING = "draining"
    """It finishes what it plays, and takes nothing new."""
    DEAD = "dead"
    """It plays no more, and never will."""


class WorkerEvent(StrEnum):
    STARTED = "started"
    SYNCED = "synced"
    PUBLISH = "publish"
    DRAIN = "drain"
    EMPTY = "empty"
    DIED = "died"


_TRANSITIONS: dict[tuple[WorkerState, WorkerEvent], WorkerState] = {
    (WorkerState.STARTING, WorkerEvent.STARTED): WorkerState.SYNCING,
    (WorkerState.SYNCING, WorkerEvent.SYNCED): WorkerState.READY,
    (WorkerState.READY, WorkerEvent.PUBLISH): WorkerState.SYNCING,
    (WorkerState.READY, WorkerEvent.DRAIN): WorkerState.DRAINING,
    (WorkerState.STARTING, WorkerEvent.DRAIN): WorkerState.DEAD,
    (WorkerState.SYNCING, WorkerEvent.DRAIN): WorkerState.DEAD,
    (WorkerState.DRAINING, WorkerEvent.DRAIN): WorkerState.DRAINING,
    (WorkerState.DRAINING, WorkerEvent.EMPTY): WorkerState.DEAD,
    **{(state, WorkerEvent.DIED): WorkerState.DEAD for state in WorkerState},
}


class InvalidTransitionError(RuntimeError):
    """An event that cannot happen in this state: a bug of the fleet, not of the worker."""


def next_state(state: WorkerState, event: WorkerEvent) -> WorkerState:
    """The state that follows; raises `InvalidTransitionError` where none does."""
    try:
        return _TRANSITIONS[state, event]
    except KeyError:
        raise InvalidTransitionError(f"a worker that is {state} cannot have event {event}") from None
