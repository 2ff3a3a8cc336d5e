"""Follows the episode logs of a run and indexes appended lines."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from vz_ray.report.viewer.episode_index import EpisodeIndex, IndexBatch, LinePosition, LogFileState
from vz_ray.report.viewer.episode_row import EpisodeParseError, EpisodeRow, episode_row, parse_line

LOG_PATTERNS = ("episodes/*.jsonl", "eval/*.jsonl")
MAX_LINE_BYTES = 64 * 2**20
"""Maximum line length; longer lines are skipped and reported."""
BATCH_BYTES = 8 * 2**20
"""Size of a batch of lines."""
TAIL_BYTES = 64
"""Number of bytes before the read offset that identify a known file."""
POLL_INTERVAL_S = 1.0


class LogFollower:
    """Keeps an episode index in sync with the logs of a run.

    An unterminated last line is read once it is complete. Other invalid lines are skipped and recorded with the
    reason. A deleted, replaced or truncated log is removed from the index and, if it exists, read again.

    Args:
        run: Run directory.
        index: Index to update.
    """

    def __init__(self, run: Path, index: EpisodeIndex) -> None:
        self.run, self.index = run, index
        self.indexed_bytes, self.total_bytes = 0, 0
        """Bytes in the index, and bytes on disk at the last poll."""
        self.error = ""
        """Error of the last poll; empty on success."""
        self._last_seen: dict[str, tuple[int, int, int]] = {}
        """File state of each log at the last poll. An unchanged log is not opened."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow", daemon=True)

    def start(self) -> None:
        """Poll the logs in a thread until `close`."""
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_behind(self) -> bool:
        """Whether more than one batch is pending."""
        return self.total_bytes - self.indexed_bytes > BATCH_BYTES

    def catch_up(self) -> None:
        """Poll every log once; return when all complete lines are indexed, or on `close`."""
        logs = self._list_logs()
        read_states = self.index.files()
        for name in read_states.keys() - logs.keys():
            self.index.remove_file(name)
        sizes = {name: status.st_size for name, (_, status) in logs.items()}
        read = {name: min(state.offset, sizes[name]) for name, state in read_states.items() if name in sizes}
        self.total_bytes, self.indexed_bytes = sum(sizes.values()), sum(read.values())
        for name, (path, status) in logs.items():
            state, current = read_states.get(name), (status.st_mtime_ns, status.st_size, status.st_ino)
            if state is not None and self._last_seen.get(name) == current:
                continue
            if state is not None and not _is_same_log(path, status, state):
                self.index.remove_file(name)
                self.indexed_bytes -= read[name]
                state = None
            if (state is not None and status.st_size == state.offset) or self._index_new_lines(
                path, name, status.st_ino, state
            ):
                self._last_seen[name] = current

    def _list_logs(self) -> dict[str, tuple[Path, os.stat_result]]:
        """Return the logs by name, oldest first, so newer episodes have higher ids."""
        logs = []
        for pattern in LOG_PATTERNS:
            for path in self.run.glob(pattern):
                try:
                    logs.append((path, path.stat()))
                except OSError:
                    continue  # deleted in the meantime
        logs.sort(key=lambda log: (log[1].st_mtime_ns, log[0].name))
        return {path.relative_to(self.run).as_posix(): (path, status) for path, status in logs}

    def _index_new_lines(self, path: Path, name: str, inode: int, state: LogFileState | None) -> bool:
        """Index a log to its end; return False on failure, so that the next poll retries."""
        try:
            file = path.open("rb")
        except OSError as error:
            self.error = f"{name} cannot be read: {error.strerror or error}"
            return False
        with file:
            for batch in read_batches(file, name, inode, state):
                if self._stop.is_set() or not self.index.add_batch(batch):
                    return False
                self.indexed_bytes += batch.after.offset - (batch.before.offset if batch.before else 0)
        return True

    def _follow(self) -> None:
        while not self._stop.is_set():
            try:
                self.error = ""
                self.catch_up()
            except Exception as error:  # displayed in the page; the next poll retries
                self.error = f"following the logs failed: {error!r}"
            self._stop.wait(POLL_INTERVAL_S)


def _is_same_log(path: Path, status: os.stat_result, state: LogFileState) -> bool:
    """Return whether a log still starts with the indexed part, judged by inode, size and tail."""
    if status.st_ino != state.inode or status.st_size < state.offset:
        return False
    with path.open("rb") as file:
        file.seek(state.offset - len(state.tail))
        return file.read(len(state.tail)) == state.tail


def read_batches(file: BinaryIO, name: str, inode: int, state: LogFileState | None) -> Iterator[IndexBatch]:
    """Yield the lines of a log after `state` in batches of about `BATCH_BYTES`."""
    offset, number = (state.offset, state.lines) if state else (0, 0)
    episodes: list[tuple[LinePosition, EpisodeRow]] = []
    skipped_lines: list[tuple[int, str]] = []
    before, batch_start, line = state, offset, b""

    def batch() -> IndexBatch:
        after = LogFileState(name, inode, offset, number, line[-TAIL_BYTES:])
        return IndexBatch(before, after, episodes, skipped_lines)

    file.seek(offset)
    for line, length in _lines(file):
        number += 1
        try:
            if length > len(line):
                raise EpisodeParseError(f"{length} bytes; the maximum is {MAX_LINE_BYTES}")
            value = parse_line(line)
            if value is not None:
                episodes.append((LinePosition(number, offset, length), episode_row(value)))
        except EpisodeParseError as error:
            skipped_lines.append((number, str(error)[:500]))
        offset += length
        if offset - batch_start >= BATCH_BYTES:
            finished = batch()
            yield finished
            before, batch_start, episodes, skipped_lines = finished.after, offset, [], []
    if before is None or offset > before.offset:
        yield batch()


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yield complete lines and their lengths in bytes; of a too long line, only the last bytes."""
    while chunk := file.readline(MAX_LINE_BYTES):
        line, length = chunk, len(chunk)
        while not line.endswith(b"\n"):
            if len(chunk) < MAX_LINE_BYTES:
                return  # unterminated line at the end of the file
            chunk = file.readline(MAX_LINE_BYTES)
            line, length = line[-TAIL_BYTES:] + chunk, length + len(chunk)
        yield line, length
