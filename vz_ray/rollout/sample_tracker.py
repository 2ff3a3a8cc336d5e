"""Exactly-once bookkeeping: each (step, task, sample) is accepted once, or discarded with a reason.

Episodes run at least once and are accepted exactly once. An episode may be retried after its worker
was lost, and the lost worker's trajectory may still arrive. The tracker accepts the first trajectory
and rejects later ones. Pure; part of the run's checkpoint.

    pending --accept---> accepted
       |----discard----> discarded

`accepted` and `discarded` are final.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vz_ray.env.trajectory import EpisodeId

SampleKey = tuple[int, str, int]
"""(step, task id, sample index)"""


@dataclass
class SampleTracker:
    """Samples of the steps that are not closed yet.

    Attributes:
        attempts: Number of retries of each pending sample.
        accepted: Accepted attempt of each accepted sample.
        discarded: Reason of each discarded sample.
        rejected: Number of duplicate or unknown trajectories, by reason.
    """

    attempts: dict[SampleKey, int] = field(default_factory=dict)
    accepted: dict[SampleKey, int] = field(default_factory=dict)
    discarded: dict[SampleKey, str] = field(default_factory=dict)
    rejected: Counter[str] = field(default_factory=Counter)

    def register(self, step: int, task_id: str, group_size: int) -> list[EpisodeId]:
        """Register `group_size` samples of a task; return the ids of their first attempts.

        Raises:
            ValueError: A sample is already registered.
        """
        keys = [(step, task_id, sample) for sample in range(group_size)]
        for key in keys:
            if key in self.attempts or key in self.accepted or key in self.discarded:
                raise ValueError(f"sample {key} is already registered")
        self.attempts.update(dict.fromkeys(keys, 0))
        return [EpisodeId(*key) for key in keys]

    def retry(self, sample: SampleKey) -> EpisodeId:
        """Return the id of the next attempt of a pending sample."""
        if sample not in self.attempts:
            raise ValueError(f"sample {sample} is not pending")
        self.attempts[sample] += 1
        return EpisodeId(*sample, attempt=self.attempts[sample])

    def accept(self, id: EpisodeId) -> bool:
        """Accept the first trajectory of a pending sample; return False for any other."""
        if id.sample_key in self.attempts:
            del self.attempts[id.sample_key]
            self.accepted[id.sample_key] = id.attempt
            return True
        duplicate = id.sample_key in self.accepted or id.sample_key in self.discarded
        self.rejected["duplicate" if duplicate else "not registered"] += 1
        return False

    def discard(self, sample: SampleKey, reason: str) -> None:
        """Discard a pending sample."""
        if sample not in self.attempts:
            raise ValueError(f"sample {sample} is not pending")
        del self.attempts[sample]
        self.discarded[sample] = reason

    def close_step(self, step: int) -> None:
        """Delete the records of all steps up to `step`, after their checkpoint.

        Raises:
            ValueError: A sample is still pending.
        """
        if pending := [key for key in self.attempts if key[0] <= step]:
            raise ValueError(f"cannot close step {step}: {len(pending)} samples are pending, first {pending[0]}")
        for records in (self.accepted, self.discarded):
            for key in [key for key in records if key[0] <= step]:
                del records[key]

    def reopen(self, step: int) -> None:
        """Delete the records from `step` on, so that these steps can run again."""
        for records in (self.attempts, self.accepted, self.discarded):
            for key in [key for key in records if key[0] >= step]:
                del records[key]

    @property
    def pending(self) -> tuple[SampleKey, ...]:
        return tuple(self.attempts)

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {
            "attempts": [[*key, count] for key, count in self.attempts.items()],
            "accepted": [[*key, attempt] for key, attempt in self.accepted.items()],
            "discarded": [[*key, reason] for key, reason in self.discarded.items()],
            "rejected": dict(self.rejected),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> SampleTracker:
        """Restore the state written by `to_dict`."""

        def records(name: str) -> dict[SampleKey, Any]:
            return {(row[0], row[1], row[2]): row[3] for row in content[name]}

        return cls(records("attempts"), records("accepted"), records("discarded"), Counter(content["rejected"]))
