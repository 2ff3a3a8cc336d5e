"""Per-sample results on disk, from which an interrupted evaluation resumes."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from vz_ray.data.episode_log import EpisodeLog, episode_key
from vz_ray.data.episode_record import EpisodeRecord, record_from_dict
from vz_ray.utils.errors import UserError
from vz_ray.utils.json_lines import read_complete_lines

EPISODE_FOLDERS = ("episodes", "validation", "eval")
"""Folders of a run directory with episode logs."""
EvalResult = EpisodeRecord
"""A scored episode; `stage` names the evaluation."""


class EvalLog(EpisodeLog):
    """`eval/<name>.jsonl`: a header with the identity of the evaluation, then one line per episode."""

    header_key: ClassVar[str] = "evaluation"


def count_answered(path: Path) -> int:
    """Return the number of results in a log that are not to be retried; 0 if the file is missing."""
    return sum(not result.trajectory.retryable for result in read_results(path)) if path.exists() else 0


def find_episode_log(path: Path) -> Path:
    """Return `path` unless it is a run directory or a folder of logs; of those, return the newest log.

    Raises:
        UserError: The directory has no episode log.
    """
    if not path.is_dir():
        return path
    run_folders = [path / name for name in EPISODE_FOLDERS if (path / name).is_dir()]
    for folder in run_folders or [path]:
        if logs := list(folder.glob("*.jsonl")):
            return max(logs, key=lambda log: (log.stat().st_mtime, log.name))
    places = " or ".join(f"{folder}/" for folder in run_folders or [path])
    raise UserError(f"{path} has no episodes: there is no *.jsonl in {places}; give a run or an episode log")


def read_results(path: Path) -> list[EvalResult]:
    """Read the results of an evaluation log; the last line of an episode wins.

    An episode log of training has no header; all its lines are returned.
    """
    lines = list(read_complete_lines(path))
    results = [record_from_dict(line) for line in lines if EvalLog.header_key not in line]
    if len(results) == len(lines):
        return results
    return list({episode_key(result): result for result in results}.values())
