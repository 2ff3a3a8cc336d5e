"""Queries of the episode index: list pages, filter options, charts, groups and positions."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Field, FiniteFloat

from vz_ray.env.failure_modes import FailureMode
from vz_ray.report.viewer.episode_index import SORT_COLUMNS
from vz_ray.report.viewer.episode_row import OUTCOMES

Json = dict[str, Any]

MAX_ROWS = 200
"""Maximum rows of a list page."""
MAX_POINTS = 240
"""Maximum points of a chart line; more steps are averaged per point."""
MAX_SAMPLES = 128
"""Maximum number of samples of a group."""
MAX_SKIPPED_LINES = 100
SORT_IN_MEMORY_ROWS = 2000
ZOOMS_OR_MORE = 4
"""Number of zooms in a filter that includes all higher numbers."""
MAX_SAFE_INTEGER = 2**53 - 1
"""Largest integer that JavaScript represents exactly."""
SafeInteger = Annotated[int, Field(ge=-MAX_SAFE_INTEGER, le=MAX_SAFE_INTEGER)]

_FROM = "episodes JOIN tasks ON tasks.id = episodes.task"
_LISTED = (
    "episodes.id, stage, step, tasks.task, sample, kind, question, truth, answer, status, outcome, failure, "
    "reward, advantage, zooms, refused, frames, turns, seconds"
)
_SAME_GROUP = "(stage, step, episodes.task) = (SELECT stage, step, task FROM episodes WHERE id = ?)"
_NAMES = [name.strip().removeprefix("episodes.").removeprefix("tasks.") for name in _LISTED.split(",")]


class EpisodeFilter(BaseModel, frozen=True):
    """Filter of episodes; None or an empty value matches all.

    Attributes:
        stage: `train` or the name of an evaluation.
        step_from, step_to: First and last training step.
        reward_from, reward_to: Minimum and maximum total reward.
        zooms: Number of valid zooms; `ZOOMS_OR_MORE` means that number or more.
        outcome: One of `OUTCOMES`, or a `FailureMode`.
        text: Substring of the question, ground truth, answer or task id, case-insensitive.
    """

    stage: str = ""
    step_from: SafeInteger | None = None
    step_to: SafeInteger | None = None
    reward_from: FiniteFloat | None = None
    reward_to: FiniteFloat | None = None
    kind: str = ""
    zooms: SafeInteger | None = None
    outcome: str = ""
    text: Annotated[str, Field(max_length=200)] = ""

    def sql(self) -> tuple[str, list[Any]]:
        """Return an SQL condition on `episodes` and its values."""
        parts = [
            ("stage = ?", self.stage or None),
            ("step >= ?", self.step_from),
            ("step <= ?", self.step_to),
            ("reward >= ?", self.reward_from),
            ("reward <= ?", self.reward_to),
            ("zooms >= ?" if self.zooms == ZOOMS_OR_MORE else "zooms = ?", self.zooms),
            ("episodes.task IN (SELECT id FROM tasks WHERE kind = ?)", self.kind or None),
            ("outcome = ?" if self.outcome in OUTCOMES else "failure = ?", self.outcome or None),
        ]
        conditions = [sql for sql, value in parts if value is not None]
        values: list[Any] = [value for _, value in parts if value is not None]
        if self.text:
            like = f"%{_escape_like(self.text)}%"
            conditions.append(
                "(answer LIKE ? ESCAPE '\\' OR episodes.task IN (SELECT id FROM tasks WHERE"
                " question LIKE ? ESCAPE '\\' OR truth LIKE ? ESCAPE '\\' OR task LIKE ? ESCAPE '\\'))"
            )
            values += [like] * 4
        return " AND ".join(conditions) or "1", values


def _escape_like(text: str) -> str:
    """Escape the wildcards of LIKE."""
    for sign in ("\\", "%", "_"):
        text = text.replace(sign, "\\" + sign)
    return text


def episode_page(
    db: sqlite3.Connection, episode_filter: EpisodeFilter, sort: str, ascending: bool, offset: int, limit: int
) -> Json:
    """Return rows `[offset, offset + limit)` of the sorted list, at most `MAX_ROWS`, and the total number."""
    condition, values = episode_filter.sql()
    total = count_episodes(db, episode_filter)
    direction = "ASC" if ascending else "DESC"
    # For few rows, filter first and sort afterwards: walking the sort index would be slow.
    key = f"+{SORT_COLUMNS[sort]}" if total <= SORT_IN_MEMORY_ROWS else SORT_COLUMNS[sort]
    order = f"{key} {direction}, episodes.id {direction}"
    ids = f"SELECT id FROM episodes WHERE {condition} ORDER BY {order} LIMIT ? OFFSET ?"
    rows = db.execute(
        f"SELECT {_LISTED} FROM {_FROM} WHERE episodes.id IN ({ids}) ORDER BY {order}",
        [*values, min(limit, MAX_ROWS), offset],
    )
    return {"total": total, "offset": offset, "rows": [dict(zip(_NAMES, row, strict=True)) for row in rows]}


def count_episodes(db: sqlite3.Connection, episode_filter: EpisodeFilter) -> int:
    condition, values = episode_filter.sql()
    return int(db.execute(f"SELECT count(*) FROM episodes WHERE {condition}", values).fetchone()[0])


def neighbours(db: sqlite3.Connection, episode_filter: EpisodeFilter, sort: str, ascending: bool, episode: int) -> Json:
    """Return the ids of the previous and next episode in the sorted list; None at the ends."""
    condition, values = episode_filter.sql()
    key = SORT_COLUMNS[sort]
    neighbour_ids: Json = {}
    for name, forward in (("next", True), ("previous", False)):
        increasing = ascending == forward
        sign, direction = (">", "ASC") if increasing else ("<", "DESC")
        row = db.execute(
            f"SELECT id FROM episodes WHERE {condition} AND ({key}, id) {sign} "
            f"(SELECT {key}, id FROM episodes WHERE id = ?) ORDER BY {key} {direction}, id {direction} LIMIT 1",
            [*values, episode],
        ).fetchone()
        neighbour_ids[name] = row[0] if row else None
    return neighbour_ids


def filter_options(db: sqlite3.Connection) -> Json:
    """Return the possible filter values with their numbers of episodes."""

    def rows(sql: str) -> list[list[Any]]:
        return [list(row) for row in db.execute(sql)]

    return {
        "stages": rows("SELECT stage, count(*) FROM episodes GROUP BY stage ORDER BY 1"),
        "kinds": rows(
            "SELECT kind, sum(n) FROM (SELECT task, count(*) AS n FROM episodes GROUP BY task) AS counts"
            " JOIN tasks ON tasks.id = counts.task GROUP BY kind ORDER BY 1"
        ),
        "zooms": rows("SELECT zooms, count(*) FROM episodes GROUP BY zooms ORDER BY 1"),
        "many_zooms": ZOOMS_OR_MORE,
        "steps": rows("SELECT min(step), max(step) FROM episodes")[0],
        "rewards": rows("SELECT min(reward), max(reward) FROM episodes")[0],
    }


def outcome_counts(db: sqlite3.Connection, episode_filter: EpisodeFilter) -> list[Json]:
    """Count episodes by outcome: right, each failure in the order of `FailureMode`, not scored."""
    condition, values = episode_filter.sql()
    rows = db.execute(
        f"SELECT outcome, failure, count(*) FROM episodes WHERE {condition} GROUP BY outcome, failure", values
    ).fetchall()
    totals = {"right": 0, **{failure.value: 0 for failure in FailureMode}, "unjudged": 0}
    for outcome, failure, number in rows:
        totals[failure or outcome] = totals.get(failure or outcome, 0) + number
    return [{"name": name, "count": number} for name, number in totals.items() if number]


def step_series(db: sqlite3.Connection, episode_filter: EpisodeFilter) -> Json:
    """Return means by step, one line per stage, stages with the most points first.

    Returns:
        `width`, the number of steps per point, and `stages`: name and `points` of each stage. A point is
        `[first step, mean reward or None, mean zooms, accuracy of scored episodes or None, episodes]`.
    """
    condition, values = episode_filter.sql()
    low, high = db.execute(f"SELECT min(step), max(step) FROM episodes WHERE {condition}", values).fetchone()
    if low is None:
        return {"width": 1, "stages": []}
    width = (high - low) // MAX_POINTS + 1
    # Grouping by single steps uses the index order; grouping by point would need a sort.
    rows = db.execute(
        "SELECT stage, step, total(reward), count(reward), sum(zooms), sum(outcome = 'right'),"
        " sum(outcome = 'wrong'), count(*)"
        f" FROM episodes WHERE {condition} GROUP BY stage, step ORDER BY stage, step",
        values,
    )
    sums: dict[str, dict[int, list[float]]] = {}
    for stage, step, *parts in rows:
        first = low + (step - low) // width * width
        point_sums = sums.setdefault(stage, {}).setdefault(first, [0.0] * len(parts))
        point_sums[:] = [total + value for total, value in zip(point_sums, parts, strict=True)]
    stages = [
        {"stage": stage, "points": [_point(first, *parts) for first, parts in points.items()]}
        for stage, points in sums.items()
    ]
    stages.sort(key=lambda line: (-len(line["points"]), line["stage"]))
    return {"width": width, "stages": stages}


def _point(
    step: int, reward: float, scored: float, zooms: float, right: float, wrong: float, episodes: float
) -> list[Any]:
    """Compute the means of a point from its sums."""
    share = right / (right + wrong) if right + wrong else None
    return [step, reward / scored if scored else None, zooms / episodes, share, int(episodes)]


@dataclass(frozen=True, slots=True)
class EpisodeLocation:
    """Position and row of an episode.

    Attributes:
        row: Columns of the list.
        file: Log, relative to the run directory.
        line: Line number, from 1.
        offset: Offset of the line in bytes.
        length: Length of the line in bytes.
        video: Id of the task's video.
    """

    row: Json
    file: str
    line: int
    offset: int
    length: int
    video: int


def find_episode(db: sqlite3.Connection, episode: int) -> EpisodeLocation | None:
    locations = _find(db, "episodes.id = ?", [episode])
    return locations[0] if locations else None


def find_group(db: sqlite3.Connection, location: EpisodeLocation) -> list[EpisodeLocation]:
    """Return all samples of the group of an episode, in order."""
    return _find(db, _SAME_GROUP, [location.row["id"]])


def _find(db: sqlite3.Connection, condition: str, values: Sequence[Any]) -> list[EpisodeLocation]:
    rows = db.execute(
        f"SELECT files.name, line, episodes.offset, length, tasks.video, {_LISTED} FROM {_FROM}"
        f" JOIN files ON files.id = episodes.file WHERE {condition}"
        " ORDER BY sample, attempt, episodes.id LIMIT ?",
        [*values, MAX_SAMPLES],
    )
    return [EpisodeLocation(dict(zip(_NAMES, row[5:], strict=True)), *row[:5]) for row in rows]


def group_size(db: sqlite3.Connection, location: EpisodeLocation) -> int:
    return int(db.execute(f"SELECT count(*) FROM episodes WHERE {_SAME_GROUP}", [location.row["id"]]).fetchone()[0])


def video_uri(db: sqlite3.Connection, video: int) -> str | None:
    """Return the path or URL of a video by its id; None for an unknown id."""
    row = db.execute("SELECT uri FROM videos WHERE id = ?", [video]).fetchone()
    return row[0] if row else None


def count_skipped_lines(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT count(*) FROM skipped_lines").fetchone()[0])


def skipped_lines(db: sqlite3.Connection) -> Json:
    """Return the number of skipped lines, and the first `MAX_SKIPPED_LINES` of them with their reasons."""
    rows = db.execute(
        "SELECT name, line, reason FROM skipped_lines JOIN files ON files.id = file ORDER BY name, line LIMIT ?",
        [MAX_SKIPPED_LINES],
    )
    lines = [{"file": name, "line": line, "reason": reason} for name, line, reason in rows]
    return {"count": count_skipped_lines(db), "lines": lines}
