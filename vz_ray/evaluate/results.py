"""Per-sample results on disk; an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from vz_ray.data.episode_log import EpisodeLog, key_of
from vz_ray.data.record import EpisodeRecord, record_from_dict, whole_lines

EvalResult = EpisodeRecord
"""One question played and scored; `stage` names the evaluation."""


class EvalLog(EpisodeLog):
    """`eval/<name>.jsonl`: what is evaluated, then one line per question."""

    header: ClassVar[str] = "evaluation"


def answered(path: Path) -> int:
    """How many questions a log holds a result of that counts; 0 if there is no log."""
    return sum(not result.trajectory.failed for result in read_results(path)) if path.exists() else 0


def read_results(path: Path) -> list[EvalResult]:
    """The results of an evaluation log, the last of each question.

    An episode log has no header and is read whole.
    """
    lines = list(whole_lines(path))
    results = [record_from_dict(line) for line in lines if EvalLog.header not in line]
    if len(results) == len(lines):
        return results
    return list({key_of(result): result for result in results}.values())
