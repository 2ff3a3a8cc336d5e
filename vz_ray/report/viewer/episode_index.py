"""The index of a run's episodes: where each line is, and the columns that lists need of it.

An SQLite file in the user's cache directory rather than arrays in memory:
opening a run again takes no time, a filter over 100,000 episodes is one query,
and a request touches only the rows that it shows. Not in the run directory,
which may be on a volume that is shared or read-only, where SQLite's locks do not
hold. It can be deleted at any time: it is made again from the logs.

Everything that is written goes through transactions that check where the last
one stopped, so that several browsers of one run may share an index.
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

SCHEMA_VERSION = 1
LOCK_TIMEOUT_S = 30.0

_TASK = ("task", "video", "kind", "question", "truth")
"""Columns that the samples of a task share; kept once."""
_OWN = tuple(field.name for field in fields(EpisodeRow) if field.name not in _TASK)

MISSING_VALUE = -1e9
"""Stands for no value where episodes are sorted by it."""

SORT_COLUMNS = {
    "newest": "episodes.id",
    "step": "step",
    "reward": f"ifnull(reward, {MISSING_VALUE})",
    "advantage": f"ifnull(advantage, {MISSING_VALUE})",
    "zooms": "zooms",
    "frames": "frames",
    "seconds": "seconds",
}
"""What lists may be sorted by, as SQL; each has an index of its own."""

_SORTED_BY = "".join(
    f"CREATE INDEX by_{name} ON episodes ({sql}, id);"
    for name, sql in SORT_COLUMNS.items()
    if name != "newest"
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
    task INTEGER NOT NULL, {", ".join(_OWN)}
);
CREATE TABLE problems (file INTEGER NOT NULL, line INTEGER NOT NULL, why TEXT NOT NULL);
CREATE INDEX episodes_of_file ON episodes (file);
CREATE INDEX episodes_of_group ON episodes (stage, step, task, outcome, failure, reward, zooms);
{_SORTED_BY}
PRAGMA user_version = {SCHEMA_VERSION};
"""


@dataclass(frozen=True, slots=True)
class LinePosition:
    """Where a line is: bytes `[offset, offset + length)` of a file, its end of line included."""

    line: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class LogFileState:
    """How far a log has been read.

    Attributes:
        name: Relative to the run directory.
        inode: Which file that was.
        offset: Bytes read, whole lines only.
        lines: Lines read.
        tail: The last bytes before `offset`: a file that has others there is another one.
    """

    name: str
    inode: int
    offset: int
    lines: int
    tail: bytes


@dataclass(frozen=True, slots=True)
class IndexBatch:
    """Lines of one log, read together."""

    before: LogFileState | None
    after: LogFileState
    episodes: Sequence[tuple[LinePosition, EpisodeRow]]
    skipped_lines: Sequence[tuple[int, str]]


def index_path(run: Path) -> Path:
    """Where the index of a run directory is."""
    digest = hashlib.blake2b(str(run.resolve()).encode(), digest_size=8).hexdigest()
    return resolve_cache_dir("") / "view" / f"{run.resolve().name[:60]}-{digest}.sqlite"


class EpisodeIndex:
    """The index of one run; every thread has a connection of its own.

    An index of another version, or one that is damaged, is made anew; where the
    cache directory cannot be written, it is kept in a temporary one.

    Args:
        run: The run directory.
        path: Where the index is; by default in the user's cache directory.
    """

    def __init__(self, run: Path, path: Path | None = None) -> None:
        self.run, self.path = run, path or index_path(run)
        self._local = threading.local()
        self._every: list[sqlite3.Connection] = []
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._begin()
        except (OSError, sqlite3.OperationalError):
            self._temporary = tempfile.TemporaryDirectory(prefix="vz_ray_view_")
            self.path = Path(self._temporary.name) / "index.sqlite"
            self._begin()

    def close(self) -> None:
        for connection in self._every:
            connection.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    @property
    def connection(self) -> sqlite3.Connection:
        """This thread's."""
        if not hasattr(self._local, "connection"):
            self._local.connection = self._connect()
        return self._local.connection

    @property
    def revision(self) -> int:
        """Changes whenever the index does."""
        return int(self.connection.execute("SELECT revision FROM meta").fetchone()[0])

    def files(self) -> dict[str, LogFileState]:
        """Logs by name."""
        rows = self.connection.execute("SELECT name, inode, offset, lines, tail FROM files")
        return {row[0]: LogFileState(*row) for row in rows}

    def add_batch(self, batch: IndexBatch) -> bool:
        """Adds lines; False if somebody else has read on from there meanwhile."""
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
            names = f"file, line, offset, length, task, {', '.join(_OWN)}"
            marks = ", ".join("?" * (5 + len(_OWN)))
            tasks: dict[tuple[str, ...], int] = {}
            db.executemany(
                f"INSERT INTO episodes ({names}) VALUES ({marks})",
                [
                    (file, *astuple(place), _task(db, columns, tasks), *_own(columns))
                    for place, columns in batch.episodes
                ],
            )
            db.executemany(
                "INSERT INTO problems VALUES (?, ?, ?)", [(file, *one) for one in batch.skipped_lines]
            )
        return True

    def remove_file(self, name: str) -> None:
        """Takes out everything of a log that is gone, or is another file now."""
        with self._writing() as db:
            for table in ("episodes", "problems"):
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
        # `close` is called from the main thread, when no other uses its connection any more.
        connection = sqlite3.connect(
            self.path, timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        self._every.append(connection)
        return connection

    def _begin(self) -> None:
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
            self._start_over()
        db = self.connection
        db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA}")
        db.execute("INSERT INTO meta VALUES (?, 0)", (str(self.run.resolve()),))
        db.execute("COMMIT")

    def _start_over(self) -> None:
        self.close()
        self._every, self._local = [], threading.local()
        for suffix in ("", "-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)


_own = attrgetter(*_OWN)


def _task(db: sqlite3.Connection, one: EpisodeRow, known: dict[tuple[str, ...], int]) -> int:
    """The row of an episode's task; `known` are those of the batch so far."""
    key = (one.task, one.video, one.question, one.truth, one.kind)
    if key not in known:
        db.execute("INSERT OR IGNORE INTO videos (uri) VALUES (?)", (one.video,))
        (video,) = db.execute("SELECT id FROM videos WHERE uri = ?", (one.video,)).fetchone()
        values = (one.task, video, one.question, one.truth, one.kind)
        db.execute(
            "INSERT OR IGNORE INTO tasks (task, video, question, truth, kind) VALUES (?, ?, ?, ?, ?)", values
        )
        (known[key],) = db.execute(
            "SELECT id FROM tasks WHERE (task, video, question, truth, kind) = (?, ?, ?, ?, ?)", values
        ).fetchone()
    return known[key]
