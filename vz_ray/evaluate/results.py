"""Per-sample results on disk; an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

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

EvalResult = EpisodeRecord
"""One question played and scored; `stage` names the evaluation."""

_HEADER = "evaluation"


class EvalLog:
    """`eval/<name>.jsonl`: a header that says what is evaluated, then one line per question.

    Opening an existing log cuts off a half-written last line, and refuses a
    log of something else: results of two models must not be mixed.

    Args:
        path: Where the log is or will be.
        identity: JSON values that make two evaluations the same one: weights,
            data, prompt, sampling.

    Raises:
        ValueError: The log at `path` has another identity, or a broken line.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.results: list[EvalResult] = []
        header = {_HEADER: dict(identity)}
        if not path.exists() or not self._reopen(header):
            append_lines(path, [to_line(header)])

    def _reopen(self, header: dict[str, Any]) -> bool:
        """Reads what is there; False if that is nothing."""
        self._cut_half_line()
        lines = whole_lines(self.path)
        found = next(lines, None)
        if found is None:
            return False
        if found != header:
            raise ValueError(
                f"{self.path} holds results of {found.get(_HEADER)}, not of {header[_HEADER]}; "
                "delete it or choose another run name"
            )
        self.results = [record_from_dict(line) for line in lines]
        return True

    def _cut_half_line(self) -> None:
        with self.path.open("rb+") as file:
            data = file.read()
            file.truncate(data.rfind(b"\n") + 1)

    @property
    def done(self) -> frozenset[tuple[str, int]]:
        """`(task id, sample)` of every result so far."""
        return frozenset((result.task.task_id, result.trajectory.id.sample) for result in self.results)

    def append(self, result: EvalResult) -> None:
        """Adds a result; it is on disk when this returns.

        Raises:
            ValueError: The log has a result of this task and sample already.
        """
        key = (result.task.task_id, result.trajectory.id.sample)
        if key in self.done:
            raise ValueError(f"{self.path} already has task {key[0]!r}, sample {key[1]}")
        append_lines(self.path, [to_line(record_to_dict(result))])
        self.results.append(result)


def read_results(path: Path) -> list[EvalResult]:
    """The results of an evaluation log, or of an episode log, which has no header."""
    return [record_from_dict(line) for line in whole_lines(path) if _HEADER not in line]
