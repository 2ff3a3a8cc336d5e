"""Questions to the index: pages of the list, what can be chosen from, charts, groups, an episode's place."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vz_ray.env.failure_modes import FailureMode
from vz_ray.report.viewer.episode_index import SORT_COLUMNS
from vz_ray.report.viewer.episode_row import OUTCOMES

Json = dict[str, Any]

MAX_ROWS = 200
"""Rows of one page of the list."""
MAX_POINTS = 240
"""Points of a line in a chart; more steps than that are drawn several to a point."""
MAX_SAMPLES = 128
"""Samples of a group that are shown."""
MAX_SKIPPED_LINES = 100
SORT_IN_MEMORY_ROWS = 2000

_FROM = "episodes JOIN tasks ON tasks.id = episodes.task"
_LISTED = (
    "episodes.id, stage, step, tasks.task, sample, kind, question, truth, answer, status, outcome, failure, "
    "reward, advantage, zooms, refused, frames, turns, seconds"
)
_NAMES = [name.strip().removeprefix("episodes.").removeprefix("tasks.") for name in _LISTED.split(",")]


@dataclass(frozen=True, slots=True)
class EpisodeFilter:
    """Which episodes; what is None or empty leaves all.

    Attributes:
        stage: Where they were played.
        step_from: First training iteration.
        step_to: Last training iteration.
        reward_from: Lowest total reward.
        reward_to: Highest total reward.
        kind: Kind of question.
        zooms: Number of zooms carried out; `ZOOMS_OR_MORE` stands for as many and more.
        outcome: One of `OUTCOMES`, or a `FailureMode`.
        text: Is in the question, the truth or the answer, in any case of its letters.
    """

    stage: str = ""
    step_from: int | None = None
    step_to: int | None = None
    reward_from: float | None = None
    reward_to: float | None = None
    kind: str = ""
    zooms: int | None = None
    outcome: str = ""
    text: str = ""

    def sql(self) -> tuple[str, list[Any]]:
        """A condition on `episodes`, and its values."""
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
            like = f"%{_literal(self.text)}%"
            conditions.append(
                "(answer LIKE ? ESCAPE '\\' OR episodes.task IN (SELECT id FROM tasks WHERE"
                " question LIKE ? ESCAPE '\\' OR truth LIKE ? ESCAPE '\\' OR task LIKE ? ESCAPE '\\'))"
            )
            values += [like] * 4
        return " AND ".join(conditions) or "1", values


ZOOMS_OR_MORE = 4


def _literal(text: str) -> str:
    """`text` for LIKE, its wildcards taken as they are."""
    for sign in ("\\", "%", "_"):
        text = text.replace(sign, "\\" + sign)
    return text


def episode_page(
    db: sqlite3.Connection, where: EpisodeFilter, sort: str, up: bool, offset: int, limit: int
) -> Json:
    """Rows `[offset, offset + limit)` of the sorted list, at most `MAX_ROWS`, and their number in all."""
    condition, values = where.sql()
    total = count_episodes(db, where)
    way = "ASC" if up else "DESC"
    # Few rows are found by looking at all and sorted then: walking the list as it is sorted would be slow.
    key = f"+{SORT_COLUMNS[sort]}" if total <= SORT_IN_MEMORY_ROWS else SORT_COLUMNS[sort]
    order = f"{key} {way}, episodes.id {way}"
    ids = f"SELECT id FROM episodes WHERE {condition} ORDER BY {order} LIMIT ? OFFSET ?"
    rows = db.execute(
        f"SELECT {_LISTED} FROM {_FROM} WHERE episodes.id IN ({ids}) ORDER BY {order}",
        [*values, min(limit, MAX_ROWS), offset],
    )
    return {"total": total, "offset": offset, "rows": _rows(rows)}


def count_episodes(db: sqlite3.Connection, where: EpisodeFilter) -> int:
    condition, values = where.sql()
    return int(db.execute(f"SELECT count(*) FROM episodes WHERE {condition}", values).fetchone()[0])


def neighbours(db: sqlite3.Connection, where: EpisodeFilter, sort: str, up: bool, episode: int) -> Json:
    """Ids of the episodes before and after one in the sorted list; None at its ends."""
    condition, values = where.sql()
    key = SORT_COLUMNS[sort]
    found: Json = {}
    for name, forward in (("next", True), ("previous", False)):
        ascending = up == forward
        sign, way = (">", "ASC") if ascending else ("<", "DESC")
        row = db.execute(
            f"SELECT id FROM episodes WHERE {condition} AND ({key}, id) {sign} "
            f"(SELECT {key}, id FROM episodes WHERE id = ?) ORDER BY {key} {way}, id {way} LIMIT 1",
            [*values, episode],
        ).fetchone()
        found[name] = row[0] if row else None
    return found


def _rows(cursor: sqlite3.Cursor) -> list[Json]:
    return [dict(zip(_NAMES, row, strict=True)) for row in cursor]


def filter_options(db: sqlite3.Connection) -> Json:
    """What the filters can be set to, with how many episodes each leaves."""

    def counted(sql: str) -> list[list[Any]]:
        return [list(row) for row in db.execute(sql)]

    steps = db.execute("SELECT min(step), max(step) FROM episodes").fetchone()
    rewards = db.execute("SELECT min(reward), max(reward) FROM episodes").fetchone()
    return {
        "stages": counted("SELECT stage, count(*) FROM episodes GROUP BY stage ORDER BY 1"),
        "kinds": counted(
            "SELECT kind, sum(n) FROM (SELECT task, count(*) AS n FROM episodes GROUP BY task) AS counts"
            " JOIN tasks ON tasks.id = counts.task GROUP BY kind ORDER BY 1"
        ),
        "zooms": counted("SELECT zooms, count(*) FROM episodes GROUP BY zooms ORDER BY 1"),
        "many_zooms": ZOOMS_OR_MORE,
        "steps": list(steps),
        "rewards": list(rewards),
    }


def outcome_counts(db: sqlite3.Connection, where: EpisodeFilter) -> list[Json]:
    """How many episodes came out how: right, each failure in the order of `FailureMode`, not judged."""
    condition, values = where.sql()
    rows = db.execute(
        f"SELECT outcome, failure, count(*) FROM episodes WHERE {condition} GROUP BY outcome, failure", values
    ).fetchall()
    totals = {"right": 0, **{failure.value: 0 for failure in FailureMode}, "unjudged": 0}
    for outcome, failure, number in rows:
        totals[failure or outcome] = totals.get(failure or outcome, 0) + number
    return [{"name": name, "count": number} for name, number in totals.items() if number]


def step_series(db: sqlite3.Connection, where: EpisodeFilter) -> Json:
    """Means by step, one line per stage, the stages with most points first.

    Returns:
        `width`, how many steps a point stands for, and `stages`: of each its
        name and `points`, `[first step, mean reward or None, mean zooms, share
        right of those judged or None, episodes]`.
    """
    condition, values = where.sql()
    low, high = db.execute(f"SELECT min(step), max(step) FROM episodes WHERE {condition}", values).fetchone()
    if low is None:
        return {"width": 1, "stages": []}
    width = (high - low) // MAX_POINTS + 1
    # Sums by single steps come out of an index in order; several to a point would be sorted first.
    rows = db.execute(
        "SELECT stage, step, total(reward), count(reward), sum(zooms), sum(outcome = 'right'),"
        " sum(outcome = 'wrong'), count(*)"
        f" FROM episodes WHERE {condition} GROUP BY stage, step ORDER BY stage, step",
        values,
    )
    sums: dict[str, dict[int, list[float]]] = {}
    for stage, step, *parts in rows:
        first = low + (step - low) // width * width
        of_point = sums.setdefault(stage, {}).setdefault(first, [0.0] * len(parts))
        of_point[:] = [before + more for before, more in zip(of_point, parts, strict=True)]
    stages = [
        {"stage": stage, "points": [_point(first, *parts) for first, parts in points.items()]}
        for stage, points in sums.items()
    ]
    stages.sort(key=lambda one: (-len(one["points"]), one["stage"]))
    return {"width": width, "stages": stages}


def _point(
    step: int, reward: float, judged: float, zooms: float, right: float, wrong: float, episodes: float
) -> list[Any]:
    """Means from sums."""
    share = right / (right + wrong) if right + wrong else None
    return [step, reward / judged if judged else None, zooms / episodes, share, int(episodes)]


@dataclass(frozen=True, slots=True)
class EpisodeLocation:
    """Where an episode is, and what is known of it without reading it.

    Attributes:
        row: As in the list.
        file: Log, relative to the run directory.
        line: Its number in it, from 1.
        offset: Bytes before it.
        length: Its bytes.
        video: Number of its task's video.
    """

    row: Json
    file: str
    line: int
    offset: int
    length: int
    video: int


def find_episode(db: sqlite3.Connection, episode: int) -> EpisodeLocation | None:
    found = _find(db, "episodes.id = ?", [episode])
    return found[0] if found else None


def find_group(db: sqlite3.Connection, found: EpisodeLocation) -> list[EpisodeLocation]:
    """All samples of the task of an episode in its stage and step, in their order."""
    return _find(
        db,
        "(stage, step, episodes.task) = (SELECT stage, step, task FROM episodes WHERE id = ?)",
        [found.row["id"]],
    )


def _find(db: sqlite3.Connection, condition: str, values: Sequence[Any]) -> list[EpisodeLocation]:
    rows = db.execute(
        f"SELECT files.name, line, episodes.offset, length, tasks.video, {_LISTED} FROM {_FROM}"
        f" JOIN files ON files.id = episodes.file WHERE {condition}"
        " ORDER BY sample, attempt, episodes.id LIMIT ?",
        [*values, MAX_SAMPLES],
    )
    return [EpisodeLocation(dict(zip(_NAMES, row[5:], strict=True)), *row[:5]) for row in rows]


def group_size(db: sqlite3.Connection, found: EpisodeLocation) -> int:
    return int(
        db.execute(
            "SELECT count(*) FROM episodes WHERE (stage, step, task) ="
            " (SELECT stage, step, task FROM episodes WHERE id = ?)",
            [found.row["id"]],
        ).fetchone()[0]
    )


def video_uri(db: sqlite3.Connection, video: int) -> str | None:
    """Path or URL of a video that some episode names; None for any other number."""
    row = db.execute("SELECT uri FROM videos WHERE id = ?", [video]).fetchone()
    return row[0] if row else None


def count_skipped_lines(db: sqlite3.Connection) -> int:
    """How many lines were skipped."""
    return int(db.execute("SELECT count(*) FROM problems").fetchone()[0])


def skipped_lines(db: sqlite3.Connection) -> list[Json]:
    """The first `MAX_SKIPPED_LINES` lines that were skipped, and why."""
    rows = db.execute(
        "SELECT name, line, why FROM problems JOIN files ON files.id = file ORDER BY name, line LIMIT ?",
        [MAX_SKIPPED_LINES],
    )
    return [{"file": name, "line": line, "why": why} for name, line, why in rows]
