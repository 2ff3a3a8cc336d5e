"""LRU cache of small files in one directory, shared by all processes of a machine.

Entries are renamed into place, so readers need no lock. Each entry begins with its hash; a corrupt
entry is deleted and counts as a miss. Large entries are memory-mapped. Writers count the bytes that
they add. A process that has added a fraction of the size limit scans the directory and evicts the
least recently used entries, one process at a time. I/O errors are cache misses, never exceptions.
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

_EVICTION_INTERVAL = 16
"""A process scans for eviction after it has added this fraction (1/16) of the limit."""
_RECENT_EVICTION_S = 600.0
"""A new process scans at its first write unless another one did within this time."""
_TARGET_FRACTION = 0.9
"""An eviction reduces the cache to this fraction of the limit."""
_STALE_PART_S = 600.0
"""Age of a partial file after which its writer counts as dead."""
_FULL_DISK_PAUSE_S = 30.0
"""Pause of writes after the disk was full."""
_PART_SUFFIX = ".part"
_LOCK_FILE = "eviction.lock"
_HASH_BYTES = 16
_MIN_MAPPED_BYTES = 64 * 2**10
"""Smaller entries are copied, because the number of mappings per process is limited."""


class _Entry(NamedTuple):
    used_s: float
    num_bytes: int
    path: str


class DiskCache:
    """LRU cache of files by key.

    Args:
        root: Directory on a local disk; created if missing.
        max_bytes: Size limit. Each writing process may exceed it by up to 1/16.
    """

    def __init__(self, root: Path | str, max_bytes: int) -> None:
        self._root, self._max_bytes = Path(root), max_bytes
        self._lock = threading.Lock()
        # Starting at the limit makes the first write scan the directory.
        self._added_bytes = 0 if self._evicted_recently() else max_bytes
        self._paused_until = 0.0

    def get(self, key: str) -> Bytes | None:
        """Return the entry's bytes, read-only, or None. Marks the entry as recently used."""
        path = self._path(key)
        try:
            with open(path, "rb", buffering=0) as file:
                stored = _read_or_map(file)
                os.utime(file.fileno())
        except OSError:
            return None
        if len(stored) >= _HASH_BYTES:
            stored_hash, content = stored[:_HASH_BYTES], stored[_HASH_BYTES:]
            if xxhash.xxh3_128_digest(content.data) == stored_hash.tobytes():
                return content
        with contextlib.suppress(OSError):
            os.unlink(path)
        return None

    def put(self, key: str, *parts: bytes | memoryview) -> bool:
        """Write an entry unless it exists. Returns False if the write failed or writes are paused."""
        path = self._path(key)
        now = time.monotonic()
        if now < self._paused_until:
            return False
        part_path = f"{path}.{os.getpid()}-{threading.get_ident()}{_PART_SUFFIX}"
        try:
            if os.path.exists(path):
                return True
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            try:
                with open(part_path, "wb") as file:
                    content_hash = xxhash.xxh3_128()
                    for part in parts:
                        content_hash.update(part)
                    for part in (content_hash.digest(), *parts):
                        file.write(part)
                os.replace(part_path, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(part_path)
                raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._paused_until = now + _FULL_DISK_PAUSE_S
                self.evict(0, self._max_bytes // 2)
            return False
        self._count_added(sum(len(part) for part in parts))
        return True

    def evict(self, threshold_bytes: int, target_bytes: int) -> None:
        """Evict the least recently used entries down to `target_bytes`, if above `threshold_bytes`.

        Returns at once if another process evicts.
        """
        with self._try_lock() as locked:
            if not locked:
                return
            with contextlib.suppress(OSError):
                os.utime(self._root / _LOCK_FILE)
            entries = sorted(self._entries())
            total_bytes = sum(entry.num_bytes for entry in entries)
            if total_bytes <= threshold_bytes:
                return
            for entry in entries:
                if total_bytes <= target_bytes:
                    break
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
                total_bytes -= entry.num_bytes

    def _count_added(self, num_bytes: int) -> None:
        with self._lock:
            self._added_bytes += num_bytes
            if self._added_bytes < self._max_bytes // _EVICTION_INTERVAL:
                return
            self._added_bytes = 0
        self.evict(self._max_bytes, int(self._max_bytes * _TARGET_FRACTION))

    def _evicted_recently(self) -> bool:
        with contextlib.suppress(OSError):
            return 0 <= time.time() - os.stat(self._root / _LOCK_FILE).st_mtime < _RECENT_EVICTION_S
        return False

    @contextlib.contextmanager
    def _try_lock(self) -> Iterator[bool]:
        try:
            handle = os.open(self._root / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
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
        """Yield all entries, and delete partial files of dead writers."""
        stale_before = time.time() - _STALE_PART_S
        for folder, _, names in os.walk(self._root):
            for name in names:
                if name == _LOCK_FILE:
                    continue
                path = os.path.join(folder, name)
                try:
                    status = os.stat(path)
                    if not name.endswith(_PART_SUFFIX):
                        yield _Entry(status.st_mtime, status.st_size, path)
                    elif status.st_mtime < stale_before:
                        os.unlink(path)
                except OSError:
                    continue  # deleted by another process

    def _path(self, key: str) -> str:
        return os.path.join(self._root, key[:2], key)


def _read_or_map(file: io.FileIO) -> Bytes:
    size = os.fstat(file.fileno()).st_size
    if size < _MIN_MAPPED_BYTES:
        return np.frombuffer(file.read(), dtype=np.uint8)
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    return np.frombuffer(mmap.mmap(file.fileno(), size, flags=flags, prot=mmap.PROT_READ), dtype=np.uint8)


def resolve_cache_dir(directory: str) -> Path:
    """Return `directory`, or `vz_ray` in the user's cache directory if it is empty."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(directory or os.path.join(user_cache, "vz_ray"))
