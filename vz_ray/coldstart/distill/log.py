"""Episodes that an expert has played, on disk; an interrupted distillation goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vz_ray.data.record import (
    EpisodeRecord,
    append_lines,
    record_from_dict,
    record_to_dict,
    to_line,
    whole_lines,
)
from vz_ray.episode.trajectory import Status
from vz_ray.observe.errors import UserError
from vz_ray.reward import JUDGE_FAILED

Key = tuple[str, int]
"""Task id and attempt."""

_HEADER = "distillation"


class PlayLog:
    """A header that says what is played and how, then one line per episode.

    An episode that failed, or whose judge did, is not done: it is played
    again, and the later line counts.

    Args:
        path: Where the log is or will be; a half-written last line is cut off.
        identity: JSON values that make two distillations the same one.

    Raises:
        UserError: The log at `path` has another identity.
        ValueError: It has a broken line.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._records: dict[Key, EpisodeRecord] = {}
        header = {_HEADER: dict(identity)}
        lines: Iterator[dict[str, Any]] = iter(())
        if path.exists():
            with path.open("rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
            lines = whole_lines(path)
        found = next(lines, None)
        if found is None:
            append_lines(path, [to_line(header)])
        elif found != json.loads(to_line(header)):
            other = _difference(found.get(_HEADER), header[_HEADER])
            raise UserError(
                f"{path} holds episodes of {other}: choose another name, or delete it (replies that are "
                "paid for stay, and are used again)"
            )
        for line in lines:
            self._take(record_from_dict(line))

    @property
    def records(self) -> list[EpisodeRecord]:
        """One per task and attempt, the last of each, ordered by both."""
        return [self._records[key] for key in sorted(self._records)]

    @property
    def done(self) -> frozenset[Key]:
        return frozenset(key for key, record in self._records.items() if not _failed(record))

    def append(self, record: EpisodeRecord) -> None:
        """Adds an episode; it is on disk when this returns."""
        append_lines(self.path, [to_line(record_to_dict(record))])
        self._take(record)

    def _take(self, record: EpisodeRecord) -> None:
        self._records[record.task.task_id, record.trajectory.id.sample] = record


def _failed(record: EpisodeRecord) -> bool:
    """Whether trying again may give what this lacks."""
    reward = record.trajectory.reward
    unjudged = reward is not None and not reward.valid and reward.reason.startswith(f"{JUDGE_FAILED} ")
    return record.trajectory.status is Status.FAILED or unjudged


def _difference(was: Any, now: Mapping[str, Any]) -> str:
    """The first thing in which they differ."""
    was = was if isinstance(was, dict) else {}
    name = next((name for name in now if was.get(name) != json.loads(json.dumps(now[name]))), "")
    return f"another {name} ({was.get(name)!r} there, {now.get(name)!r} now)"
