"""Reads what a run appends to its logs into the index, once or for as long as it goes on."""

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
"""Bytes of a line; a longer one is skipped and named."""
BATCH_BYTES = 8 * 2**20
"""Bytes of lines that are read into the index together."""
TAIL_BYTES = 64
"""Bytes by which a file that was read before is known again."""
POLL_INTERVAL_S = 1.0


class LogFollower:
    """Keeps an index at what a run's logs hold.

    A last line without an end is half-written and waits for the rest; any other
    line that is no episode is skipped, and the index says which and why. A log
    that is gone, replaced or cut is forgotten and, if it is there, read again.

    Args:
        run: The run directory.
        index: What is written to.
    """

    def __init__(self, run: Path, index: EpisodeIndex) -> None:
        self.run, self.index = run, index
        self.indexed_bytes, self.total_bytes = 0, 0
        """Bytes of logs in the index, and on disk when they were last looked at."""
        self.error = ""
        """Why the last look failed; empty if it did not."""
        self._looked: dict[str, tuple[int, int, int]] = {}
        """What each log was like at the last look: one that is still so is not opened."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow", daemon=True)

    def start(self) -> None:
        """Looks at the logs again and again, in a thread, until `close`."""
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_behind(self) -> bool:
        """Whether more is on disk than a moment's work."""
        return self.total_bytes - self.indexed_bytes > BATCH_BYTES

    def catch_up(self) -> None:
        """One look at every log; returns when the index holds all whole lines, or at `close`."""
        found = self._found()
        known = self.index.files()
        for name in known.keys() - found.keys():
            self.index.remove_file(name)
        sizes = {name: status.st_size for name, (_, status) in found.items()}
        read = {name: min(state.offset, sizes[name]) for name, state in known.items() if name in sizes}
        self.total_bytes, self.indexed_bytes = sum(sizes.values()), sum(read.values())
        for name, (path, status) in found.items():
            state, like = known.get(name), (status.st_mtime_ns, status.st_size, status.st_ino)
            if state is not None and self._looked.get(name) == like:
                continue
            if state is not None and not _same(path, status, state):
                self.index.remove_file(name)
                self.indexed_bytes -= read[name]
                state = None
            if (state is not None and status.st_size == state.offset) or self._read_on(
                path, name, status.st_ino, state
            ):
                self._looked[name] = like

    def _found(self) -> dict[str, tuple[Path, os.stat_result]]:
        """Logs by name, the one written to longest ago first, so that newer episodes have higher ids."""
        found = []
        for pattern in LOG_PATTERNS:
            for path in self.run.glob(pattern):
                try:
                    found.append((path, path.stat()))
                except OSError:
                    continue  # It went while we looked; so it will be missing at the next look too.
        found.sort(key=lambda one: (one[1].st_mtime_ns, one[0].name))
        return {path.relative_to(self.run).as_posix(): (path, status) for path, status in found}

    def _read_on(self, path: Path, name: str, inode: int, state: LogFileState | None) -> bool:
        """Reads a log to its end; False where that did not work out, so that the next look tries again."""
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
            except Exception as error:  # Shown in the page; the next look may fare better.
                self.error = f"the logs cannot be followed: {error!r}"
            self._stop.wait(POLL_INTERVAL_S)


def _same(path: Path, status: os.stat_result, state: LogFileState) -> bool:
    """Whether a log still begins with what was read of it, as far as a look at its last bytes tells."""
    if status.st_ino != state.inode or status.st_size < state.offset:
        return False
    with path.open("rb") as file:
        file.seek(state.offset - len(state.tail))
        return file.read(len(state.tail)) == state.tail


def read_batches(file: BinaryIO, name: str, inode: int, state: LogFileState | None) -> Iterator[IndexBatch]:
    """What a log holds beyond `state`, in parts of about `BATCH_BYTES`."""
    offset, number = (state.offset, state.lines) if state else (0, 0)
    episodes: list[tuple[LinePosition, EpisodeRow]] = []
    problems: list[tuple[int, str]] = []
    before, begun, line = state, offset, b""

    def batch() -> IndexBatch:
        after = LogFileState(name, inode, offset, number, line[-TAIL_BYTES:])
        return IndexBatch(before, after, episodes, problems)

    file.seek(offset)
    for line, length in _lines(file):
        number += 1
        try:
            if length > len(line):
                raise EpisodeParseError(f"{length} bytes long, over the {MAX_LINE_BYTES} that are read")
            value = parse_line(line)
            if value is not None:
                episodes.append((LinePosition(number, offset, length), episode_row(value)))
        except EpisodeParseError as error:
            problems.append((number, str(error)[:500]))
        offset += length
        if offset - begun >= BATCH_BYTES:
            made = batch()
            yield made
            before, begun, episodes, problems = made.after, offset, [], []
    if before is None or offset > before.offset:
        yield batch()


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Whole lines with their lengths in bytes; of one that is too long, only the last bytes."""
    while chunk := file.readline(MAX_LINE_BYTES):
        line, length = chunk, len(chunk)
        while not line.endswith(b"\n"):
            if len(chunk) < MAX_LINE_BYTES:
                return  # Half-written: at the end of the file.
            chunk = file.readline(MAX_LINE_BYTES)
            line, length = line[-TAIL_BYTES:] + chunk, length + len(chunk)
        yield line, length
