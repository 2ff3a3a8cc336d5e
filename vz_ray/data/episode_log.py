"""Append-only log of episodes, from which an interrupted evaluation or generation resumes."""

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
"""Task id and sample index."""


class EpisodeLog:
    """JSON-lines file: a header with the settings, then one line per episode. Base class of log types.

    Opening an existing log truncates an incomplete last line, and rejects a log with other settings,
    so that episodes of two models are never mixed. A failed episode (dead worker, failed judge) is
    not complete: it is sampled again, and the later line replaces the earlier one.

    Args:
        path: Path of the log; created if missing.
        identity: JSON values that identify the log: weights, data, prompt, sampling parameters.

    Raises:
        UserError: The log at `path` has another identity.
        ValueError: A line is invalid.
    """

    header_key: ClassVar[str]
    """Key of the header line."""
    mismatch_hint: ClassVar[str] = "delete it or choose another run name"
    """Advice in the error about a log with another identity."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._records: dict[EpisodeKey, EpisodeRecord] = {}
        header = to_json_line({self.header_key: dict(identity)})
        if not path.exists() or not self._resume(json.loads(header)):
            append_lines(path, [header])

    def _resume(self, expected: dict[str, Any]) -> bool:
        """Read the existing log. Returns False if it is empty."""
        with self.path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
        lines = read_complete_lines(self.path)
        header = next(lines, None)
        if header is None:
            return False
        if header != expected:
            difference = _first_difference(header.get(self.header_key), expected[self.header_key])
            raise UserError(f"{self.path} contains episodes with {difference}; {self.mismatch_hint}")
        for line in lines:
            record = record_from_dict(line)
            self._records[episode_key(record)] = record
        return True

    @property
    def records(self) -> list[EpisodeRecord]:
        """The latest record of each task and sample, in order of their first record."""
        return list(self._records.values())

    @property
    def completed(self) -> frozenset[EpisodeKey]:
        """Keys of all complete episodes."""
        return frozenset(key for key, record in self._records.items() if not record.trajectory.retryable)

    def append(self, record: EpisodeRecord) -> None:
        """Append an episode and sync the file to disk.

        Raises:
            ValueError: The log already contains this task and sample.
        """
        key = episode_key(record)
        if key in self._records and not self._records[key].trajectory.retryable:
            raise ValueError(f"{self.path} already has task {key[0]!r}, sample {key[1]}")
        append_lines(self.path, [to_json_line(record_to_dict(record))])
        self._records[key] = record


def episode_key(record: EpisodeRecord) -> EpisodeKey:
    return (record.task.task_id, record.trajectory.id.sample)


def _first_difference(existing: Any, expected: Mapping[str, Any]) -> str:
    """Describe the first difference between two identities."""
    if not isinstance(existing, Mapping):
        return "an unknown header"
    name = next((name for name in {**expected, **existing} if existing.get(name) != expected.get(name)), "")
    return f"another {name} ({existing.get(name)!r} there, {expected.get(name)!r} now)"
