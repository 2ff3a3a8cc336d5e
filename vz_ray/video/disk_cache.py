"""Small files under one directory, shared by all processes of a machine, within a size cap.

An entry appears whole or not at all, so readers need no lock, and it is sealed
with its hash: one that was damaged is dropped as if it had never been. Large ones are
mapped, not copied: who holds such bytes holds the file's pages. Writers count
what they add; whoever has added a share of the cap looks at the whole
directory and drops what was not used for longest, one process at a time.
Nothing here fails: a cache that cannot be read or written is slow, not wrong.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import mmap
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_SWEEP_SHARE = 16
"""A sweep is due when a sixteenth of the cap was added."""
_SWEPT_S = 600.0
"""A process that starts looks at the directory itself only if nobody did for as long."""
_KEEP = 0.9
"""A sweep leaves this much of the cap."""
_STALE_S = 600.0
"""A part file as old as this was left by a process that died."""
_PAUSE_S = 30.0
"""How long nothing is written after the disk was found full."""
_PART = ".part"
_LOCK = "sweep.lock"
_SEAL = 16
"""Bytes of the hash that an entry begins with."""
_MAPPED = 64 * 2**10
"""Entries at least this large are mapped; there is a limit to how many mappings a process may have."""


class _Entry(NamedTuple):
    used: float
    size: int
    path: str


class DiskCache:
    """Files by key, least recently used dropped first.

    Args:
        root: Made if it is missing; must be on a local disk.
        most_bytes: Size cap, exceeded by a sixteenth at most for each process that writes.

    Attributes:
        failed_writes: Writes that did not succeed: disk full, no permission.
        corrupt_entries: Entries found damaged.
        evicted_entries: Entries that this process dropped to stay under the cap.
    """

    def __init__(self, root: Path | str, max_bytes: int) -> None:
        self._root, self._most = Path(root), max_bytes
        self._lock = threading.Lock()
        self._added = 0 if self._just_swept() else max_bytes  # else the first write looks at what is there
        self._paused_until = 0.0
        self.failed_writes = self.corrupt_entries = self.evicted_entries = 0

    def get(self, key: str) -> Bytes | None:
        """The entry's bytes, read-only, or None; being read makes it recently used."""
        path = self._path(key)
        try:
            with open(path, "rb", buffering=0) as file:
                found = _contents(file)
                os.utime(file.fileno())
        except OSError:
            return None
        if len(found) >= _SEAL and xxhash.xxh3_128_digest(found[_SEAL:].data) == found[:_SEAL].tobytes():
            return found[_SEAL:]
        self.corrupt_entries += 1
        with contextlib.suppress(OSError):
            os.unlink(path)
        return None

    def put(self, key: str, *parts: bytes | memoryview) -> bool:
        """Writes an entry unless it is there; False if that failed."""
        path = self._path(key)
        now = time.monotonic()
        if now < self._paused_until:
            return False
        part = f"{path}.{os.getpid()}-{threading.get_ident()}{_PART}"
        try:
            if os.path.exists(path):
                return True
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            try:
                with open(part, "wb") as file:
                    seal = xxhash.xxh3_128()
                    for piece in parts:
                        seal.update(piece)
                    for piece in (seal.digest(), *parts):
                        file.write(piece)
                os.replace(part, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(part)
                raise
        except OSError as error:
            self.failed_writes += 1
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._paused_until = now + _PAUSE_S
                self.evict(0, self._most // 2)
            return False
        self._count(sum(len(piece) for piece in parts))
        return True

    def evict(self, threshold_bytes: int, target_bytes: int) -> None:
        """Drops the least recently used entries until at most `target_bytes` bytes are left, if there are more
        than `threshold_bytes`. If another process is at it, this one leaves it to that."""
        with self._alone() as alone:
            if not alone:
                return
            with contextlib.suppress(OSError):
                os.utime(self._root / _LOCK)
            entries = sorted(self._entries())
            left = sum(entry.size for entry in entries)
            if left <= threshold_bytes:
                return
            for entry in entries:
                if left <= target_bytes:
                    break
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
                    self.evicted_entries += 1
                left -= entry.size

    def _count(self, size: int) -> None:
        with self._lock:
            self._added += size
            if self._added < self._most // _SWEEP_SHARE:
                return
            self._added = 0
        self.evict(self._most, int(self._most * _KEEP))

    def _just_swept(self) -> bool:
        with contextlib.suppress(OSError):
            return 0 <= time.time() - os.stat(self._root / _LOCK).st_mtime < _SWEPT_S
        return False

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        try:
            handle = os.open(self._root / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError:
            yield False
            return
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
            else:
                yield True
        finally:
            os.close(handle)

    def _entries(self) -> Iterator[_Entry]:
        """Every entry; part files of dead writers are removed on the way."""
        old = time.time() - _STALE_S
        for folder, _, names in os.walk(self._root):
            for name in names:
                if name == _LOCK:
                    continue
                path = os.path.join(folder, name)
                try:
                    status = os.stat(path)
                    if not name.endswith(_PART):
                        yield _Entry(status.st_mtime, status.st_size, path)
                    elif status.st_mtime < old:
                        os.unlink(path)
                except OSError:
                    continue  # another process removed it

    def _path(self, key: str) -> str:
        return os.path.join(self._root, key[:2], key)


def _contents(file: io.FileIO) -> Bytes:
    size = os.fstat(file.fileno()).st_size
    if size < _MAPPED:
        return np.frombuffer(file.read(), dtype=np.uint8)
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    return np.frombuffer(mmap.mmap(file.fileno(), size, flags=flags, prot=mmap.PROT_READ), dtype=np.uint8)


def resolve_cache_dir(directory: str) -> Path:
    """`directory`, or `vz_ray` in the user's cache directory if it is empty."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(directory or os.path.join(home, "vz_ray"))
