"""SQLite index of the episodes of a run: position of each log line, and the columns for lists.

The index makes reopening instant, a filter over 100,000 episodes one query, and a page independent of the number
of episodes. It is in the user's cache directory, because the run directory may be read-only or on a shared volume
without working locks. It can be deleted at any time and is rebuilt from the logs.

Each transaction checks the previous read offset, so several viewers of a run can share an index.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from operator import attrgetter
from pathlib import Path

from vz_ray.report.viewer.episode_row import EpisodeRow
from vz_ray.video.disk_cache import resolve_cache_dir

SCHEMA_VERSION = 2
LOCK_TIMEOUT_S = 30.0

_TASK_COLUMNS = ("task", "video", "kind", "question", "truth")
"""Columns that all samples of a task share; stored in the table `tasks`."""
_EPISODE_COLUMNS = tuple(field.name for field in fields(EpisodeRow) if field.name not in _TASK_COLUMNS)

MISSING_VALUE = -1e9
"""Sort value of a missing reward or advantage."""

SORT_COLUMNS = {
    "newest": "episodes.id",
    "step": "step",
    "reward": f"ifnull(reward, {MISSING_VALUE})",
    "advantage": f"ifnull(advantage, {MISSING_VALUE})",
    "zooms": "zooms",
    "frames": "frames",
    "seconds": "seconds",
}
"""Sort keys and their SQL expressions; each has an SQL index."""

_SORT_INDEXES = "".join(
    f"CREATE INDEX by_{name} ON episodes ({sql}, id);" for name, sql in SORT_COLUMNS.items() if name != "newest"
)

_SCHEMA = f"""
CREATE TABLE meta (run TEXT NOT NULL, revision INTEGER NOT NULL);
CREATE TABLE files (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, inode INTEGER NOT NULL,
    offset INTEGER NOT NULL, lines INTEGER NOT NULL, tail BLOB NOT NULL
);
CREATE TABLE videos (id INTEGER PRIMARY KEY, uri TEXT NOT NULL UNIQUE);
CREATE TABLE tasks (
    id INTEGER PRIMARY KEY, task TEXT NOT NULL, video INTEGER NOT NULL, kind TEXT NOT NULL,
    question TEXT NOT NULL, truth TEXT NOT NULL, UNIQUE (task, video, question, truth, kind)
);
CREATE TABLE episodes (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    file INTEGER NOT NULL, line INTEGER NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL,
    task INTEGER NOT NULL, {", ".join(_EPISODE_COLUMNS)}
);
CREATE TABLE skipped_lines (file INTEGER NOT NULL, line INTEGER NOT NULL, reason TEXT NOT NULL);
CREATE INDEX episodes_of_file ON episodes (file);
CREATE INDEX episodes_of_group ON episodes (stage, step, task, outcome, failure, reward, zooms);
{_SORT_INDEXES}
PRAGMA user_version = {SCHEMA_VERSION};
"""


@dataclass(frozen=True, slots=True)
class LinePosition:
    """Position of a line: bytes `[offset, offset + length)` of its file, including the newline."""

    line: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class LogFileState:
    """Read position of a log.

    Attributes:
        name: Path relative to the run directory.
        inode: Inode of the file.
        offset: Number of bytes read, complete lines only.
        lines: Number of lines read.
        tail: Last bytes before `offset`, which identify the file.
    """

    name: str
    inode: int
    offset: int
    lines: int
    tail: bytes


@dataclass(frozen=True, slots=True)
class IndexBatch:
    """Consecutive lines of one log."""

    before: LogFileState | None
    after: LogFileState
    episodes: Sequence[tuple[LinePosition, EpisodeRow]]
    skipped_lines: Sequence[tuple[int, str]]


def index_path(run: Path) -> Path:
    """Return the default index path of a run directory."""
    digest = hashlib.blake2b(str(run.resolve()).encode(), digest_size=8).hexdigest()
    return resolve_cache_dir("") / "view" / f"{run.resolve().name[:60]}-{digest}.sqlite"


class EpisodeIndex:
    """Episode index of one run. Each thread has its own connection.

    An index with another schema version, or a damaged one, is rebuilt. If the cache directory is not writable, a
    temporary directory is used.

    Args:
        run: Run directory.
        path: Index file. Default: in the user's cache directory.
    """

    def __init__(self, run: Path, path: Path | None = None) -> None:
        self.run, self.path = run, path or index_path(run)
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._initialize()
        except (OSError, sqlite3.OperationalError):
            self._temporary = tempfile.TemporaryDirectory(prefix="vz_ray_view_")
            self.path = Path(self._temporary.name) / "index.sqlite"
            self._initialize()

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    @property
    def connection(self) -> sqlite3.Connection:
        """Connection of this thread."""
        if not hasattr(self._local, "connection"):
            self._local.connection = self._connect()
        return self._local.connection

    @property
    def revision(self) -> int:
        """Number that increases with each change of the index."""
        return int(self.connection.execute("SELECT revision FROM meta").fetchone()[0])

    def files(self) -> dict[str, LogFileState]:
        """Return the read position of each log by name."""
        rows = self.connection.execute("SELECT name, inode, offset, lines, tail FROM files")
        return {row[0]: LogFileState(*row) for row in rows}

    def add_batch(self, batch: IndexBatch) -> bool:
        """Add lines; return False if another process has already added lines after `batch.before`."""
        with self._writing() as db:
            row = db.execute(
                "SELECT name, inode, offset, lines, tail FROM files WHERE name = ?", (batch.after.name,)
            ).fetchone()
            if (LogFileState(*row) if row else None) != batch.before:
                return False
            state = astuple(batch.after)
            db.execute(
                "INSERT INTO files (name, inode, offset, lines, tail) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (name) DO UPDATE SET inode = ?2, offset = ?3, lines = ?4, tail = ?5",
                state,
            )
            (file,) = db.execute("SELECT id FROM files WHERE name = ?", (batch.after.name,)).fetchone()
            names = f"file, line, offset, length, task, {', '.join(_EPISODE_COLUMNS)}"
            placeholders = ", ".join("?" * (5 + len(_EPISODE_COLUMNS)))
            task_ids: dict[tuple[str, ...], int] = {}
            db.executemany(
                f"INSERT INTO episodes ({names}) VALUES ({placeholders})",
                [
                    (file, *astuple(position), _task_id(db, row, task_ids), *_episode_values(row))
                    for position, row in batch.episodes
                ],
            )
            db.executemany(
                "INSERT INTO skipped_lines VALUES (?, ?, ?)", [(file, *line) for line in batch.skipped_lines]
            )
        return True

    def remove_file(self, name: str) -> None:
        """Remove all rows of a deleted or replaced log."""
        with self._writing() as db:
            for table in ("episodes", "skipped_lines"):
                db.execute(f"DELETE FROM {table} WHERE file = (SELECT id FROM files WHERE name = ?)", (name,))
            db.execute("DELETE FROM files WHERE name = ?", (name,))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        db = self.connection
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
            db.execute("UPDATE meta SET revision = revision + 1")
        except BaseException:
            db.execute("ROLLBACK")
            raise
        db.execute("COMMIT")

    def _connect(self) -> sqlite3.Connection:
        # `close` runs in the main thread after all other threads stopped using their connections.
        connection = sqlite3.connect(self.path, timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        self._connections.append(connection)
        return connection

    def _initialize(self) -> None:
        try:
            (version,) = self.connection.execute("PRAGMA user_version").fetchone()
            if version == SCHEMA_VERSION:
                return
            empty = version == 0 and not self.connection.execute("SELECT 1 FROM sqlite_master").fetchone()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:
            empty = False
        if not empty:
            self._reset()
        db = self.connection
        db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA}")
        db.execute("INSERT INTO meta VALUES (?, 0)", (str(self.run.resolve()),))
        db.execute("COMMIT")

    def _reset(self) -> None:
        self.close()
        self._connections, self._local = [], threading.local()
        for suffix in ("", "-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)


_episode_values = attrgetter(*_EPISODE_COLUMNS)


def _task_id(db: sqlite3.Connection, row: EpisodeRow, task_ids: dict[tuple[str, ...], int]) -> int:
    """Return the row id of an episode's task; `task_ids` caches the ids of this batch."""
    key = (row.task, row.video, row.question, row.truth, row.kind)
    if key not in task_ids:
        db.execute("INSERT OR IGNORE INTO videos (uri) VALUES (?)", (row.video,))
        (video,) = db.execute("SELECT id FROM videos WHERE uri = ?", (row.video,)).fetchone()
        values = (row.task, video, row.question, row.truth, row.kind)
        db.execute("INSERT OR IGNORE INTO tasks (task, video, question, truth, kind) VALUES (?, ?, ?, ?, ?)", values)
        (task_ids[key],) = db.execute(
            "SELECT id FROM tasks WHERE (task, video, question, truth, kind) = (?, ?, ?, ?, ?)", values
        ).fetchone()
    return task_ids[key]
