"""Per-sample results on disk; an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from vz_ray.data.episode_log import EpisodeLog, episode_key
from vz_ray.data.episode_record import EpisodeRecord, record_from_dict
from vz_ray.utils.json_lines import read_complete_lines

EvalResult = EpisodeRecord
"""One question played and scored; `stage` names the evaluation."""


class EvalLog(EpisodeLog):
    """`eval/<name>.jsonl`: what is evaluated, then one line per question."""

    header_key: ClassVar[str] = "evaluation"


def count_answered(path: Path) -> int:
    """How many questions a log holds a result of that counts; 0 if there is no log."""
    return sum(not result.trajectory.retryable for result in read_results(path)) if path.exists() else 0


def read_results(path: Path) -> list[EvalResult]:
    """The results of an evaluation log, the last of each question.

    An episode log has no header and is read whole.
    """
    lines = list(read_complete_lines(path))
    results = [record_from_dict(line) for line in lines if EvalLog.header_key not in line]
    if len(results) == len(lines):
        return results
    return list({episode_key(result): result for result in results}.values())
