"""One run under view: what the HTTP part asks, answered from the index, the logs and the videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer

from vz_ray.episode.trajectory import Context
from vz_ray.observe.errors import UserError
from vz_ray.observe.metrics import read_metrics
from vz_ray.report.browser import query
from vz_ray.report.browser.columns import Columns, NoEpisode, columns_of, parse
from vz_ray.report.browser.episode_view import episode_view, group_view, trajectory_of
from vz_ray.report.browser.follow import Follower
from vz_ray.report.browser.frames import Pixels
from vz_ray.report.browser.index import Index
from vz_ray.report.browser.query import Filter, Found
from vz_ray.report.browser.tokens import find_tokenizer

Json = dict[str, Any]


class Gone(LookupError):
    """There is no such episode, group or video; says so in words."""


class Session:
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
        self.index = Index(run, index)
        self.follower = Follower(run, self.index)
        self.pixels = Pixels(str(_section(config, "clips").get("decoder") or "pyav"))
        self._choices: tuple[int, Json] | None = None
        self._metrics: tuple[tuple[int, int], dict[int, dict[str, float]]] | None = None

    def close(self) -> None:
        self.follower.close()
        self.pixels.close()
        self.index.close()

    # -- lists --------------------------------------------------------------------

    def state(self) -> Json:
        """What changes while a run goes on; small, asked for every second."""
        return {
            "run": self.run.resolve().name,
            "revision": self.index.revision,
            "episodes": query.count(self.index.connection, Filter()),
            "problems": query.problem_count(self.index.connection),
            "fault": self.follower.fault,
            "indexed": [self.follower.done, self.follower.total],
            "behind": self.follower.behind,
        }

    def problems(self) -> Json:
        return {
            "count": query.problem_count(self.index.connection),
            "lines": query.problems(self.index.connection),
        }

    def page(self, where: Filter, sort: str, up: bool, offset: int, limit: int) -> Json:
        revision = self.index.revision
        return {"revision": revision, **query.page(self.index.connection, where, sort, up, offset, limit)}

    def charts(self, where: Filter) -> Json:
        db = self.index.connection
        return {**query.series(db, where), "outcomes": query.outcomes(db, where)}

    def choices(self) -> Json:
        revision = self.index.revision
        if self._choices is None or self._choices[0] != revision:
            self._choices = (revision, query.choices(self.index.connection))
        return self._choices[1]

    def neighbours(self, where: Filter, sort: str, up: bool, episode: int) -> Json:
        return query.neighbours(self.index.connection, where, sort, up, episode)

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
        same = query.group_size(self.index.connection, found)
        place = {"file": found.file, "line": found.line}
        return {**found.row, **view, **place, "video": found.video, "samples": same}

    def group(self, number: int) -> Json:
        """The samples beside an episode; raises what `episode` raises."""
        found = self._find(number)
        samples = query.group_of(self.index.connection, found)
        view = group_view([(one.row, self._line(one)) for one in samples])
        size = query.group_size(self.index.connection, found)
        return {
            **view,
            "stage": found.row["stage"],
            "step": found.row["step"],
            "size": size,
            "video": found.video,
        }

    def context(self, number: int, turn: int) -> Context:
        """The overview (turn 0) or the reply to a turn, with the references of its frames."""
        played = trajectory_of(self._line(self._find(number)))
        if turn == 0:
            return played.prompt
        if turn <= len(played.turns) and (reply := played.turns[turn - 1].reply) is not None:
            return reply
        raise Gone(f"episode {number} was shown nothing after turn {turn}")

    def video_uri(self, video: int) -> str:
        uri = query.video_uri(self.index.connection, video)
        if uri is None:
            raise Gone(f"no episode of this run names a video {video}")
        return uri

    def _find(self, number: int) -> Found:
        found = query.find(self.index.connection, number)
        if found is None:
            raise Gone(f"no episode {number}: its log was deleted or replaced since; go back to the list")
        return found

    def _line(self, found: Found) -> Json:
        try:
            with (self.run / found.file).open("rb") as file:
                file.seek(found.offset)
                data = file.read(found.length)
        except OSError as error:
            raise Gone(f"{found.file} cannot be read: {error.strerror or error}") from error
        try:
            line = parse(data)
            fits = line is not None and _fits(columns_of(line), found)
        except NoEpisode:
            fits = False
        if not fits or line is None:
            raise Gone(f"line {found.line} of {found.file} is another one now; go back to the list")
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


def _fits(columns: Columns, found: Found) -> bool:
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
