"""Who is owed what: each (iteration, task, sample) is accepted once, or dropped with a reason.

Play is at least once, acceptance exactly once: an episode may be played again
after a worker died, and the dead one's trajectory may still arrive; the ledger
takes the first and refuses the rest. Pure; part of the run's checkpoint.

    owed --accept--> accepted
      |---drop-----> dropped

Nothing leaves `accepted` or `dropped`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vz_ray.episode.trajectory import EpisodeId

Owed = tuple[int, str, int]
"""(iteration, task id, sample)"""


@dataclass
class Ledger:
    """What is owed in the iterations that are not closed yet.

    Attributes:
        attempts: Plays begun, of every sample still owed.
        accepted: Attempt that was taken, of every sample accepted.
        dropped: Reason, of every sample given up.
        refused: Trajectories that came twice or too late, counted by why.
    """

    attempts: dict[Owed, int] = field(default_factory=dict)
    accepted: dict[Owed, int] = field(default_factory=dict)
    dropped: dict[Owed, str] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)

    def owe(self, iteration: int, task: str, samples: int) -> list[EpisodeId]:
        """`samples` plays of `task` are owed; returns the ids of their first attempts.

        Raises:
            ValueError: They were owed before.
        """
        owed = [(iteration, task, sample) for sample in range(samples)]
        for key in owed:
            if key in self.attempts or key in self.accepted or key in self.dropped:
                raise ValueError(f"sample {key} is already in the ledger")
        self.attempts.update(dict.fromkeys(owed, 0))
        return [EpisodeId(*key) for key in owed]

    def retry(self, owed: Owed) -> EpisodeId:
        """The id under which a sample that is still owed is played again."""
        if owed not in self.attempts:
            raise ValueError(f"sample {owed} is not owed")
        self.attempts[owed] += 1
        return EpisodeId(*owed, attempt=self.attempts[owed])

    def accept(self, id: EpisodeId) -> bool:
        """Takes the first trajectory of an owed sample; False for every later or unknown one."""
        if id.owed in self.attempts:
            del self.attempts[id.owed]
            self.accepted[id.owed] = id.attempt
            return True
        known = id.owed in self.accepted or id.owed in self.dropped
        self.refused["duplicate" if known else "not owed"] += 1
        return False

    def drop(self, owed: Owed, reason: str) -> None:
        """Gives a sample up; `reason` is kept."""
        if owed not in self.attempts:
            raise ValueError(f"sample {owed} is not owed")
        del self.attempts[owed]
        self.dropped[owed] = reason

    def close(self, iteration: int) -> None:
        """Forgets an iteration that is trained and checkpointed.

        Raises:
            ValueError: Something of it is still owed.
        """
        if left := [key for key in self.attempts if key[0] <= iteration]:
            raise ValueError(
                f"iteration {iteration} is closed with {len(left)} samples owed, first {left[0]}"
            )
        for book in (self.accepted, self.dropped):
            for key in [key for key in book if key[0] <= iteration]:
                del book[key]

    def reopen(self, iteration: int) -> None:
        """Forgets iterations from `iteration` on: they are played again from their beginning."""
        for book in (self.attempts, self.accepted, self.dropped):
            for key in [key for key in book if key[0] >= iteration]:
                del book[key]

    @property
    def owed(self) -> tuple[Owed, ...]:
        return tuple(self.attempts)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "attempts": [[*key, count] for key, count in self.attempts.items()],
            "accepted": [[*key, attempt] for key, attempt in self.accepted.items()],
            "dropped": [[*key, reason] for key, reason in self.dropped.items()],
            "refused": dict(self.refused),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Ledger:
        def book(name: str) -> dict[Owed, Any]:
            return {(row[0], row[1], row[2]): row[3] for row in content[name]}

        return cls(book("attempts"), book("accepted"), book("dropped"), Counter(content["refused"]))
