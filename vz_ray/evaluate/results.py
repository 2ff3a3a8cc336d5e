"""Per-sample results on disk; an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
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

EvalResult = EpisodeRecord
"""One question played and scored; `stage` names the evaluation."""

_HEADER = "evaluation"

Key = tuple[str, int]
"""Task id and sample."""


class EvalLog:
    """`eval/<name>.jsonl`: a header that says what is evaluated, then one line per question.

    Opening an existing log cuts off a half-written last line, and refuses a
    log of something else: results of two models must not be mixed. A question
    whose episode failed (a dead worker), or whose judge did, is not done: it
    is played again, and the later line counts.

    Args:
        path: Where the log is or will be.
        identity: JSON values that make two evaluations the same one: weights,
            data, prompt, sampling.

    Raises:
        UserError: The log at `path` has another identity.
        ValueError: It has a broken line.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._results: dict[Key, EvalResult] = {}
        header = {_HEADER: dict(identity)}
        if not path.exists() or not self._reopen(header):
            append_lines(path, [to_line(header)])

    def _reopen(self, header: dict[str, Any]) -> bool:
        """Reads what is there; False if that is nothing."""
        self._cut_half_line()
        found = next(whole_lines(self.path), None)
        if found is None:
            return False
        if found != json.loads(to_line(header)):
            raise UserError(
                f"{self.path} holds results of {found.get(_HEADER)}, not of {header[_HEADER]}: "
                "delete it or choose another run name"
            )
        self._results = {_key(result): result for result in read_results(self.path)}
        return True

    def _cut_half_line(self) -> None:
        with self.path.open("rb+") as file:
            data = file.read()
            file.truncate(data.rfind(b"\n") + 1)

    @property
    def results(self) -> list[EvalResult]:
        """One result per question, in the order first played."""
        return list(self._results.values())

    @property
    def done(self) -> frozenset[Key]:
        """`(task id, sample)` of every result that counts."""
        return frozenset(key for key, result in self._results.items() if not _failed(result))

    def append(self, result: EvalResult) -> None:
        """Adds a result; it is on disk when this returns.

        Raises:
            ValueError: The log has a result of this task and sample already.
        """
        key = _key(result)
        if key in self._results and not _failed(self._results[key]):
            raise ValueError(f"{self.path} already has task {key[0]!r}, sample {key[1]}")
        append_lines(self.path, [to_line(record_to_dict(result))])
        self._results[key] = result


def answered(path: Path) -> int:
    """How many questions a log holds a result of that counts; 0 if there is no log."""
    return sum(not _failed(result) for result in read_results(path)) if path.exists() else 0


def _key(result: EvalResult) -> Key:
    return (result.task.task_id, result.trajectory.id.sample)


def _failed(result: EvalResult) -> bool:
    """Whether trying again may give what this lacks."""
    reward = result.trajectory.reward
    unjudged = reward is not None and not reward.valid and reward.reason.startswith(f"{JUDGE_FAILED} ")
    return result.trajectory.status is Status.FAILED or unjudged


def read_results(path: Path) -> list[EvalResult]:
    """The results of an evaluation log, the last of each question.

    An episode log has no header and is read whole.
    """
    lines = list(whole_lines(path))
    results = [record_from_dict(line) for line in lines if _HEADER not in line]
    return (
        list({_key(result): result for result in results}.values()) if len(results) < len(lines) else results
    )
