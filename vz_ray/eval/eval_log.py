"""Per-sample results on disk, from which an interrupted evaluation resumes."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from vz_ray.data.episode_log import EpisodeLog, episode_key
from vz_ray.data.episode_record import EpisodeRecord, record_from_dict
from vz_ray.utils.json_lines import read_complete_lines

EvalResult = EpisodeRecord
"""A scored episode; `stage` names the evaluation."""


class EvalLog(EpisodeLog):
    """`eval/<name>.jsonl`: a header with the identity of the evaluation, then one line per episode."""

    header_key: ClassVar[str] = "evaluation"


def count_answered(path: Path) -> int:
    """Return the number of results in a log that are not to be retried; 0 if the file is missing."""
    return sum(not result.trajectory.retryable for result in read_results(path)) if path.exists() else 0


def read_results(path: Path) -> list[EvalResult]:
    """Read the results of an evaluation log; the last line of an episode wins.

    An episode log of training has no header; all its lines are returned.
    """
    lines = list(read_complete_lines(path))
    results = [record_from_dict(line) for line in lines if EvalLog.header_key not in line]
    if len(results) == len(lines):
        return results
    return list({episode_key(result): result for result in results}.values())
