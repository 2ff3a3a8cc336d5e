"""One run under view: what the HTTP part asks, answered from the index, the logs and the videos."""

from __future__ import annotations

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
    """There is no such episode, group or video; says so in words."""


class ViewerSession:
    """A run directory, its index, and whoever keeps that up to date.

    Args:
        run: The run directory.
        index: Where its index is kept; by default in the user's cache directory.

    Raises:
        UserError: There is no such run.
    """

    def __init__(self, run: Path, index: Path | None = None) -> None:
        _check(run)
        self.run = run
        config = _config(run)
        self.tokenizer: Tokenizer | None = find_tokenizer(str(config.get("model") or ""), run)
        self.index = EpisodeIndex(run, index)
        self.follower = LogFollower(run, self.index)
        self.frame_server = FrameServer(str(_section(config, "clips").get("decoder") or "pyav"))
        self._choices: tuple[int, Json] | None = None
        self._metrics: tuple[tuple[int, int], dict[int, dict[str, float]]] | None = None

    def close(self) -> None:
        self.follower.close()
        self.frame_server.close()
        self.index.close()

    # -- lists --------------------------------------------------------------------

    def state(self) -> Json:
        """What changes while a run goes on; small, asked for every second."""
        return {
            "run": self.run.resolve().name,
            "revision": self.index.revision,
            "episodes": index_queries.count_episodes(self.index.connection, EpisodeFilter()),
            "skipped_lines": index_queries.count_skipped_lines(self.index.connection),
            "fault": self.follower.error,
            "indexed": [self.follower.indexed_bytes, self.follower.total_bytes],
            "behind": self.follower.is_behind,
        }

    def skipped_lines(self) -> Json:
        return {
            "count": index_queries.count_skipped_lines(self.index.connection),
            "lines": index_queries.skipped_lines(self.index.connection),
        }

    def page(self, where: EpisodeFilter, sort: str, up: bool, offset: int, limit: int) -> Json:
        revision = self.index.revision
        return {
            "revision": revision,
            **index_queries.episode_page(self.index.connection, where, sort, up, offset, limit),
        }

    def charts(self, where: EpisodeFilter) -> Json:
        db = self.index.connection
        return {**index_queries.step_series(db, where), "outcomes": index_queries.outcome_counts(db, where)}

    def filter_options(self) -> Json:
        revision = self.index.revision
        if self._choices is None or self._choices[0] != revision:
            self._choices = (revision, index_queries.filter_options(self.index.connection))
        return self._choices[1]

    def neighbours(self, where: EpisodeFilter, sort: str, up: bool, episode: int) -> Json:
        return index_queries.neighbours(self.index.connection, where, sort, up, episode)

    # -- one episode --------------------------------------------------------------

    def episode(self, number: int) -> Json:
        """One episode, read from its log.

        Raises:
            Gone: There is none of this number.
            NoEpisode: Its line cannot be read.
        """
        found = self._find(number)
        line = self._line(found)
        metrics = self._metrics_of(found.row["step"]) if found.row["stage"] == "train" else None
        view = episode_view(line, self.tokenizer, metrics)
        same = index_queries.group_size(self.index.connection, found)
        place = {"file": found.file, "line": found.line}
        return {**found.row, **view, **place, "video": found.video, "samples": same}

    def group(self, number: int) -> Json:
        """The samples beside an episode; raises what `episode` raises."""
        found = self._find(number)
        samples = index_queries.find_group(self.index.connection, found)
        view = group_view([(one.row, self._line(one)) for one in samples])
        size = index_queries.group_size(self.index.connection, found)
        return {
            **view,
            "stage": found.row["stage"],
            "step": found.row["step"],
            "size": size,
            "video": found.video,
        }

    def context(self, number: int, turn: int) -> TokenContext:
        """The overview (turn 0) or the reply to a turn, with the references of its frames."""
        played = parse_trajectory(self._line(self._find(number)))
        if turn == 0:
            return played.prompt
        if turn <= len(played.turns) and (reply := played.turns[turn - 1].observation) is not None:
            return reply
        raise EpisodeNotFound(f"episode {number} was shown nothing after turn {turn}")

    def video_uri(self, video: int) -> str:
        uri = index_queries.video_uri(self.index.connection, video)
        if uri is None:
            raise EpisodeNotFound(f"no episode of this run names a video {video}")
        return uri

    def _find(self, number: int) -> EpisodeLocation:
        found = index_queries.find_episode(self.index.connection, number)
        if found is None:
            raise EpisodeNotFound(
                f"no episode {number}: its log was deleted or replaced since; go back to the list"
            )
        return found

    def _line(self, found: EpisodeLocation) -> Json:
        try:
            with (self.run / found.file).open("rb") as file:
                file.seek(found.offset)
                data = file.read(found.length)
        except OSError as error:
            raise EpisodeNotFound(f"{found.file} cannot be read: {error.strerror or error}") from error
        try:
            line = parse_line(data)
            fits = line is not None and _fits(episode_row(line), found)
        except EpisodeParseError:
            fits = False
        if not fits or line is None:
            raise EpisodeNotFound(
                f"line {found.line} of {found.file} is another one now; go back to the list"
            )
        return line

    def _metrics_of(self, step: int) -> dict[str, float] | None:
        path = self.run / "metrics.jsonl"
        try:
            status = path.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            if self._metrics is None or self._metrics[0] != stamp:
                self._metrics = (stamp, {int(row["step"]): row for row in read_metrics(path)})
        except (OSError, ValueError, KeyError):
            return None
        return self._metrics[1].get(step)


def _fits(columns: EpisodeRow, found: EpisodeLocation) -> bool:
    return all(
        getattr(columns, name) == found.row[name] for name in ("stage", "step", "task", "sample", "answer")
    )


def _check(run: Path) -> None:
    if not run.is_dir():
        raise UserError(f"no run directory at {run}: check the name")
    if not any((run / name).exists() for name in ("config.yaml", "episodes", "eval")):
        raise UserError(f"{run} is no run directory: it holds neither config.yaml nor episodes/ nor eval/")


def _config(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text()) if path.exists() else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}  # It says only which tokenizer and decoder the run had.
    return config if isinstance(config, dict) else {}


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}
