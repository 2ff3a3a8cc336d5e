"""Reads what a run appends to its logs into the index, once or for as long as it goes on."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from vz_ray.report.browser.columns import Columns, NoEpisode, columns_of, parse
from vz_ray.report.browser.index import Batch, FileState, Index, Place

LOGS = ("episodes/*.jsonl", "eval/*.jsonl")
MOST_LINE = 64 * 2**20
"""Bytes of a line; a longer one is skipped and named."""
BATCH_BYTES = 8 * 2**20
"""Bytes of lines that are read into the index together."""
TAIL = 64
"""Bytes by which a file that was read before is known again."""
EVERY_S = 1.0


class Follower:
    """Keeps an index at what a run's logs hold.

    A last line without an end is half-written and waits for the rest; any other
    line that is no episode is skipped, and the index says which and why. A log
    that is gone, replaced or cut is forgotten and, if it is there, read again.

    Args:
        run: The run directory.
        index: What is written to.
    """

    def __init__(self, run: Path, index: Index) -> None:
        self.run, self.index = run, index
        self.done, self.total = 0, 0
        """Bytes of logs in the index, and on disk when they were last looked at."""
        self.fault = ""
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
    def behind(self) -> bool:
        """Whether more is on disk than a moment's work."""
        return self.total - self.done > BATCH_BYTES

    def catch_up(self) -> None:
        """One look at every log; returns when the index holds all whole lines, or at `close`."""
        found = self._found()
        known = self.index.files()
        for name in known.keys() - found.keys():
            self.index.forget(name)
        sizes = {name: status.st_size for name, (_, status) in found.items()}
        read = {name: min(state.offset, sizes[name]) for name, state in known.items() if name in sizes}
        self.total, self.done = sum(sizes.values()), sum(read.values())
        for name, (path, status) in found.items():
            state, like = known.get(name), (status.st_mtime_ns, status.st_size, status.st_ino)
            if state is not None and self._looked.get(name) == like:
                continue
            if state is not None and not _same(path, status, state):
                self.index.forget(name)
                self.done -= read[name]
                state = None
            if (state is not None and status.st_size == state.offset) or self._read_on(
                path, name, status.st_ino, state
            ):
                self._looked[name] = like

    def _found(self) -> dict[str, tuple[Path, os.stat_result]]:
        """Logs by name, the one written to longest ago first, so that newer episodes have higher ids."""
        found = []
        for pattern in LOGS:
            for path in self.run.glob(pattern):
                try:
                    found.append((path, path.stat()))
                except OSError:
                    continue  # It went while we looked; so it will be missing at the next look too.
        found.sort(key=lambda one: (one[1].st_mtime_ns, one[0].name))
        return {path.relative_to(self.run).as_posix(): (path, status) for path, status in found}

    def _read_on(self, path: Path, name: str, inode: int, state: FileState | None) -> bool:
        """Reads a log to its end; False where that did not work out, so that the next look tries again."""
        try:
            file = path.open("rb")
        except OSError as error:
            self.fault = f"{name} cannot be read: {error.strerror or error}"
            return False
        with file:
            for batch in batches(file, name, inode, state):
                if self._stop.is_set() or not self.index.add(batch):
                    return False
                self.done += batch.after.offset - (batch.before.offset if batch.before else 0)
        return True

    def _follow(self) -> None:
        while not self._stop.is_set():
            try:
                self.fault = ""
                self.catch_up()
            except Exception as error:  # Shown in the page; the next look may fare better.
                self.fault = f"the logs cannot be followed: {error!r}"
            self._stop.wait(EVERY_S)


def _same(path: Path, status: os.stat_result, state: FileState) -> bool:
    """Whether a log still begins with what was read of it, as far as a look at its last bytes tells."""
    if status.st_ino != state.inode or status.st_size < state.offset:
        return False
    with path.open("rb") as file:
        file.seek(state.offset - len(state.tail))
        return file.read(len(state.tail)) == state.tail


def batches(file: BinaryIO, name: str, inode: int, state: FileState | None) -> Iterator[Batch]:
    """What a log holds beyond `state`, in parts of about `BATCH_BYTES`."""
    offset, number = (state.offset, state.lines) if state else (0, 0)
    episodes: list[tuple[Place, Columns]] = []
    problems: list[tuple[int, str]] = []
    before, begun, line = state, offset, b""

    def batch() -> Batch:
        after = FileState(name, inode, offset, number, line[-TAIL:])
        return Batch(before, after, episodes, problems)

    file.seek(offset)
    for line, length in _lines(file):
        number += 1
        try:
            if length > len(line):
                raise NoEpisode(f"{length} bytes long, over the {MOST_LINE} that are read")
            value = parse(line)
            if value is not None:
                episodes.append((Place(number, offset, length), columns_of(value)))
        except NoEpisode as error:
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
    while chunk := file.readline(MOST_LINE):
        line, length = chunk, len(chunk)
        while not line.endswith(b"\n"):
            if len(chunk) < MOST_LINE:
                return  # Half-written: at the end of the file.
            chunk = file.readline(MOST_LINE)
            line, length = line[-TAIL:] + chunk, length + len(chunk)
        yield line, length
