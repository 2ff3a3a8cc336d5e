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


class Event(StrEnum):
    STARTED = "started"
    SYNCED = "synced"
    PUBLISH = "publish"
    DRAIN = "drain"
    EMPTY = "empty"
    DIED = "died"


_NEXT: dict[tuple[WorkerState, Event], WorkerState] = {
    (WorkerState.STARTING, Event.STARTED): WorkerState.SYNCING,
    (WorkerState.SYNCING, Event.SYNCED): WorkerState.READY,
    (WorkerState.READY, Event.PUBLISH): WorkerState.SYNCING,
    (WorkerState.READY, Event.DRAIN): WorkerState.DRAINING,
    (WorkerState.STARTING, Event.DRAIN): WorkerState.DEAD,
    (WorkerState.SYNCING, Event.DRAIN): WorkerState.DEAD,
    (WorkerState.DRAINING, Event.DRAIN): WorkerState.DRAINING,
    (WorkerState.DRAINING, Event.EMPTY): WorkerState.DEAD,
    **{(state, Event.DIED): WorkerState.DEAD for state in WorkerState},
}


class ImpossibleEvent(RuntimeError):
    """An event that cannot happen in this state: a bug of the fleet, not of the worker."""


def after(state: WorkerState, event: Event) -> WorkerState:
    """The state that follows; raises `ImpossibleEvent` where none does."""
    try:
        return _NEXT[state, event]
    except KeyError:
        raise ImpossibleEvent(f"a worker that is {state} cannot have event {event}") from None
