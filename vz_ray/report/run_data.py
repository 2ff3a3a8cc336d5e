"""Content of a run directory, for the report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vz_ray.env.serialization import trajectory_from_dict
from vz_ray.env.trajectory import Trajectory
from vz_ray.monitoring.metric_logger import read_metrics
from vz_ray.utils.errors import UserError

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class LoggedEpisode:
    """Episode of an evaluation or episode log, with its task as JSON values."""

    stage: str
    step: int
    task: Mapping[str, Any]
    trajectory: Trajectory


@dataclass(frozen=True, slots=True)
class RunData:
    """Data of a run.

    Attributes:
        name: Name of the run.
        summary: `summary.json`, or empty.
        metric_rows: Rows of `metrics.jsonl`.
        episodes: Episodes of the agent's last evaluation, or else of the newest training step.
        config: `config.yaml` as text, or empty.
    """

    name: str
    summary: Mapping[str, Any]
    metric_rows: list[dict[str, float]]
    episodes: list[LoggedEpisode]
    config: str


def _read_episodes(path: Path) -> Iterator[LoggedEpisode]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # an interrupted write
            try:
                data = json.loads(line)
                if "trajectory" in data:
                    trajectory = trajectory_from_dict(data["trajectory"])
                    yield LoggedEpisode(data["stage"], data["step"], data["task"], trajectory)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not an episode ({error!r})") from error


def _report_episodes(run_dir: Path) -> list[LoggedEpisode]:
    """Return the evaluated episodes of the agent's last stage, or else the newest training episodes."""
    logs = [run_dir / "eval" / f"{stage}.jsonl" for stage in ("rl", "sft_continued", "cold_start")]
    logs += sorted((run_dir / "episodes").glob("*.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True)
    for log in logs:
        if log.exists() and (episodes := list(_read_episodes(log))):
            return episodes
    return []


def read_run(run_dir: Path) -> RunData:
    """Read a finished or unfinished run.

    Raises:
        UserError: The directory does not exist.
        ValueError: A file is invalid. The message names the file and the line.
    """
    if not run_dir.is_dir():
        raise UserError(f"no run directory at {run_dir}: check the name")
    summary, config = run_dir / "summary.json", run_dir / "config.yaml"
    return RunData(
        name=run_dir.resolve().name,
        summary=json.loads(summary.read_text()) if summary.exists() else {},
        metric_rows=read_metrics(run_dir / "metrics.jsonl"),
        episodes=_report_episodes(run_dir),
        config=config.read_text() if config.exists() else "",
    )
