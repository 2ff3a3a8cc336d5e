"""Data of a viewed run, from its index, logs and videos."""

from __future__ import annotations

import sqlite3
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer

from vz_ray.env.trajectory import TokenContext
from vz_ray.monitoring.metric_logger import read_metrics
from vz_ray.report.viewer import index_queries
from vz_ray.report.viewer.episode_index import EpisodeIndex
from vz_ray.report.viewer.episode_row import EpisodeParseError, EpisodeRow, episode_row, parse_line
from vz_ray.report.viewer.episode_view import episode_view, group_view, parse_trajectory
from vz_ray.report.viewer.frame_server import FrameServer
from vz_ray.report.viewer.index_queries import EpisodeFilter, EpisodeLocation
from vz_ray.report.viewer.log_follower import LogFollower
from vz_ray.report.viewer.token_texts import find_tokenizer
from vz_ray.utils.errors import UserError

Json = dict[str, Any]


class EpisodeNotFound(LookupError):
    """An episode, group or video does not exist. The message is shown to the user."""


class ViewerSession:
    """A run directory with its episode index, log follower and frame server.

    Args:
        run: Run directory.
        index: Index file. Default: in the user's cache directory.

    Raises:
        UserError: The run does not exist.
    """

    def __init__(self, run: Path, index: Path | None = None) -> None:
        _check_run_dir(run)
        self.run = run
        config = _read_config(run)
        self.tokenizer: Tokenizer | None = find_tokenizer(str(config.get("model") or ""), run)
        self.index = EpisodeIndex(run, index)
        self.follower = LogFollower(run, self.index)
        self.frame_server = FrameServer(str(_section(config, "clips").get("decoder") or "pyav"))
        self._filter_options: tuple[int, Json] | None = None

    @property
    def _db(self) -> sqlite3.Connection:
        return self.index.connection

    def close(self) -> None:
        self.follower.close()
        self.frame_server.close()
        self.index.close()

    # -- lists --------------------------------------------------------------------

    def state(self) -> Json:
        """Return the values that change during a run. The front end polls them every second."""
        return {
            "run": self.run.resolve().name,
            "revision": self.index.revision,
            "episodes": index_queries.count_episodes(self._db, EpisodeFilter()),
            "skipped_lines": index_queries.count_skipped_lines(self._db),
            "error": self.follower.error,
            "indexed": [self.follower.indexed_bytes, self.follower.total_bytes],
            "is_behind": self.follower.is_behind,
        }

    def skipped_lines(self) -> Json:
        return index_queries.skipped_lines(self._db)

    def page(self, episode_filter: EpisodeFilter, sort: str, ascending: bool, offset: int, limit: int) -> Json:
        revision = self.index.revision
        rows = index_queries.episode_page(self._db, episode_filter, sort, ascending, offset, limit)
        return {"revision": revision, **rows}

    def charts(self, episode_filter: EpisodeFilter) -> Json:
        outcomes = index_queries.outcome_counts(self._db, episode_filter)
        return {**index_queries.step_series(self._db, episode_filter), "outcomes": outcomes}

    def filter_options(self) -> Json:
        revision = self.index.revision
        if self._filter_options is None or self._filter_options[0] != revision:
            self._filter_options = (revision, index_queries.filter_options(self._db))
        return self._filter_options[1]

    def neighbours(self, episode_filter: EpisodeFilter, sort: str, ascending: bool, episode: int) -> Json:
        return index_queries.neighbours(self._db, episode_filter, sort, ascending, episode)

    # -- one episode --------------------------------------------------------------

    def episode(self, number: int) -> Json:
        """Return one episode, read from its log.

        Raises:
            EpisodeNotFound: The id is unknown.
            EpisodeParseError: The log line is invalid.
        """
        location = self._find(number)
        line = self._read_line(location)
        metrics = self._metrics_of(location.row["step"]) if location.row["stage"] == "train" else None
        view = episode_view(line, self.tokenizer, metrics)
        num_samples = index_queries.group_size(self._db, location)
        position = {"file": location.file, "line": location.line}
        return {**location.row, **view, **position, "video": location.video, "samples": num_samples}

    def group(self, number: int) -> Json:
        """Return the group of an episode; raises the same errors as `episode`."""
        location = self._find(number)
        samples = index_queries.find_group(self._db, location)
        view = group_view([(sample.row, self._read_line(sample)) for sample in samples])
        size = index_queries.group_size(self._db, location)
        position = {"stage": location.row["stage"], "step": location.row["step"]}
        return {**view, **position, "size": size, "video": location.video}

    def context(self, number: int, turn: int) -> TokenContext:
        """Return the overview (turn 0) or the observation after a turn."""
        trajectory = parse_trajectory(self._read_line(self._find(number)))
        if turn == 0:
            return trajectory.prompt
        if turn <= len(trajectory.turns) and (reply := trajectory.turns[turn - 1].observation) is not None:
            return reply
        raise EpisodeNotFound(f"episode {number} has no frames after turn {turn}")

    def video_uri(self, video: int) -> str:
        uri = index_queries.video_uri(self._db, video)
        if uri is None:
            raise EpisodeNotFound(f"no episode of this run uses video {video}")
        return uri

    def _find(self, number: int) -> EpisodeLocation:
        location = index_queries.find_episode(self._db, number)
        if location is None:
            raise EpisodeNotFound(f"no episode {number}: its log was deleted or replaced; go back to the list")
        return location

    def _read_line(self, location: EpisodeLocation) -> Json:
        try:
            with (self.run / location.file).open("rb") as file:
                file.seek(location.offset)
                data = file.read(location.length)
        except OSError as error:
            raise EpisodeNotFound(f"{location.file} cannot be read: {error.strerror or error}") from error
        try:
            line = parse_line(data)
            matches = line is not None and _matches(episode_row(line), location)
        except EpisodeParseError:
            matches = False
        if not matches or line is None:
            raise EpisodeNotFound(f"line {location.line} of {location.file} has changed; go back to the list")
        return line

    def _metrics_of(self, step: int) -> dict[str, float] | None:
        path = self.run / "metrics.jsonl"
        try:
            status = path.stat()
            return _metrics_by_step(path, status.st_mtime_ns, status.st_size).get(step)
        except (OSError, ValueError, KeyError):
            return None


@lru_cache(maxsize=1)
def _metrics_by_step(path: Path, mtime_ns: int, size: int) -> dict[int, dict[str, float]]:
    """Read the metrics; the time and size of the file are the cache key."""
    return {int(row["step"]): row for row in read_metrics(path)}


def _matches(row: EpisodeRow, location: EpisodeLocation) -> bool:
    return all(getattr(row, name) == location.row[name] for name in ("stage", "step", "task", "sample", "answer"))


def _check_run_dir(run: Path) -> None:
    if not run.is_dir():
        raise UserError(f"no run directory at {run}: check the name")
    if not any((run / name).exists() for name in ("config.yaml", "episodes", "eval")):
        raise UserError(f"{run} is not a run directory: config.yaml, episodes/ and eval/ are missing")


def _read_config(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text()) if path.exists() else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}  # only the tokenizer and the decoder are read from it
    return config if isinstance(config, dict) else {}


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}
