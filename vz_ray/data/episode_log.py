"""Played episodes on disk, a line each below a header; whoever was interrupted goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from vz_ray.data.episode_record import (
    EpisodeRecord,
    record_from_dict,
    record_to_dict,
)
from vz_ray.utils.errors import UserError
from vz_ray.utils.json_lines import append_lines, read_complete_lines, to_json_line

EpisodeKey = tuple[str, int]
"""Task id and sample."""


class EpisodeLog:
    """A header that says what is played and how, then one line per episode; a subclass for each kind of log.

    Opening an existing log cuts off a half-written last line, and refuses a
    log of something else: episodes of two models must not be mixed. An episode
    that failed (a dead worker), or whose judge did, is not done: it is played
    again, and the later line counts.

    Args:
        path: Where the log is or will be.
        identity: JSON values that make two logs the same one: weights, data, prompt, sampling.

    Raises:
        UserError: The log at `path` has another identity.
        ValueError: It has a broken line.
    """

    header_key: ClassVar[str]
    """Key of the header line."""
    mismatch_hint: ClassVar[str] = "delete it or choose another run name"
    """What to do about a log of something else."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._records: dict[EpisodeKey, EpisodeRecord] = {}
        first = to_json_line({self.header_key: dict(identity)})
        if not path.exists() or not self._reopen(json.loads(first)):
            append_lines(path, [first])

    def _reopen(self, expected: dict[str, Any]) -> bool:
        """Reads what is there; False if that is nothing."""
        with self.path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
        lines = read_complete_lines(self.path)
        found = next(lines, None)
        if found is None:
            return False
        if found != expected:
            difference = _difference(found.get(self.header_key), expected[self.header_key])
            raise UserError(f"{self.path} holds episodes of {difference}: {self.mismatch_hint}")
        for line in lines:
            record = record_from_dict(line)
            self._records[episode_key(record)] = record
        return True

    @property
    def records(self) -> list[EpisodeRecord]:
        """The last of each task and sample, in the order first played."""
        return list(self._records.values())

    @property
    def completed(self) -> frozenset[EpisodeKey]:
        """Every record that counts."""
        return frozenset(key for key, record in self._records.items() if not record.trajectory.retryable)

    def append(self, record: EpisodeRecord) -> None:
        """Adds an episode; it is on disk when this returns.

        Raises:
            ValueError: The log has one of this task and sample already.
        """
        key = episode_key(record)
        if key in self._records and not self._records[key].trajectory.retryable:
            raise ValueError(f"{self.path} already has task {key[0]!r}, sample {key[1]}")
        append_lines(self.path, [to_json_line(record_to_dict(record))])
        self._records[key] = record


def episode_key(record: EpisodeRecord) -> EpisodeKey:
    return (record.task.task_id, record.trajectory.id.sample)


def _difference(was: Any, now: Mapping[str, Any]) -> str:
    """The first thing in which two identities differ."""
    if not isinstance(was, Mapping):
        return "something else"
    name = next((name for name in {**now, **was} if was.get(name) != now.get(name)), "")
    return f"another {name} ({was.get(name)!r} there, {now.get(name)!r} now)"
