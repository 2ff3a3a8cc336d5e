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

from vz_ray.env.trajectory import EpisodeId

SampleKey = tuple[int, str, int]
"""(iteration, task id, sample)"""


@dataclass
class SampleTracker:
    """What is owed in the iterations that are not closed yet.

    Attributes:
        attempts: Plays begun, of every sample still owed.
        accepted: Attempt that was taken, of every sample accepted.
        discarded: Reason, of every sample given up.
        rejected: Trajectories that came twice or too late, counted by why.
    """

    attempts: dict[SampleKey, int] = field(default_factory=dict)
    accepted: dict[SampleKey, int] = field(default_factory=dict)
    discarded: dict[SampleKey, str] = field(default_factory=dict)
    rejected: Counter[str] = field(default_factory=Counter)

    def register(self, step: int, task_id: str, group_size: int) -> list[EpisodeId]:
        """`group_size` plays of `task_id` are owed; returns the ids of their first attempts.

        Raises:
            ValueError: They were owed before.
        """
        owed = [(step, task_id, sample) for sample in range(group_size)]
        for key in owed:
            if key in self.attempts or key in self.accepted or key in self.discarded:
                raise ValueError(f"sample {key} is already in the ledger")
        self.attempts.update(dict.fromkeys(owed, 0))
        return [EpisodeId(*key) for key in owed]

    def retry(self, sample: SampleKey) -> EpisodeId:
        """The id under which a sample that is still owed is played again."""
        if sample not in self.attempts:
            raise ValueError(f"sample {sample} is not owed")
        self.attempts[sample] += 1
        return EpisodeId(*sample, attempt=self.attempts[sample])

    def accept(self, id: EpisodeId) -> bool:
        """Takes the first trajectory of an owed sample; False for every later or unknown one."""
        if id.sample_key in self.attempts:
            del self.attempts[id.sample_key]
            self.accepted[id.sample_key] = id.attempt
            return True
        known = id.sample_key in self.accepted or id.sample_key in self.discarded
        self.rejected["duplicate" if known else "not owed"] += 1
        return False

    def discard(self, sample: SampleKey, reason: str) -> None:
        """Gives a sample up; `reason` is kept."""
        if sample not in self.attempts:
            raise ValueError(f"sample {sample} is not owed")
        del self.attempts[sample]
        self.discarded[sample] = reason

    def close_step(self, step: int) -> None:
        """Forgets an iteration that is trained and checkpointed.

        Raises:
            ValueError: Something of it is still owed.
        """
        if left := [key for key in self.attempts if key[0] <= step]:
            raise ValueError(f"iteration {step} is closed with {len(left)} samples owed, first {left[0]}")
        for book in (self.accepted, self.discarded):
            for key in [key for key in book if key[0] <= step]:
                del book[key]

    def reopen(self, step: int) -> None:
        """Forgets iterations from `step` on: they are played again from their beginning."""
        for book in (self.attempts, self.accepted, self.discarded):
            for key in [key for key in book if key[0] >= step]:
                del book[key]

    @property
    def pending(self) -> tuple[SampleKey, ...]:
        return tuple(self.attempts)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "attempts": [[*key, count] for key, count in self.attempts.items()],
            "accepted": [[*key, attempt] for key, attempt in self.accepted.items()],
            "discarded": [[*key, reason] for key, reason in self.discarded.items()],
            "rejected": dict(self.rejected),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> SampleTracker:
        def book(name: str) -> dict[SampleKey, Any]:
            return {(row[0], row[1], row[2]): row[3] for row in content[name]}

        return cls(book("attempts"), book("accepted"), book("discarded"), Counter(content["rejected"]))
