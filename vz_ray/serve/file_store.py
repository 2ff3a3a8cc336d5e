"""Uploaded files on disk.

    file-<hex>.mp4    content
    file-<hex>.json   metadata; written last, so a file exists only with its metadata

Several servers can share the directory. The writer of a file locks it until the metadata is written. A file
without metadata and without a lock is an orphan of a crashed server, or inline media; the next start deletes
it. The modification time of the metadata is the time of the last use.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import blake3

from vz_ray.serve.api_errors import ApiError, invalid_request
from vz_ray.serve.file_types import FILE_TYPES, HEADER_BYTES, FileType, detect_file_type, file_type_of_suffix
from vz_ray.utils.errors import UserError
from vz_ray.video.frame import VideoInfo

log = logging.getLogger(__name__)

FILE_ID_PATTERN = re.compile(r"file-[0-9a-f]{32}")
_DAY_S = 86400.0
_MAX_FILES = 10_000
"""Maximum number of files of all keys; equals the maximum page size of the list."""
_SPACE_CHECK_BYTES = 16 * 2**20
"""Bytes written between two checks of the directory size."""
_MIN_IDLE_S = 3600.0
"""A file is not evicted within this time after its last use."""
_METADATA, _PARTIAL = ".json", ".part"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """Metadata of one file.

    Attributes:
        id: `file-` and 128 random bits.
        owner: Owner id (of the API key).
        filename: The client's file name.
        purpose: The client's purpose.
        suffix: Suffix of the stored file; determines its type.
        bytes: Size.
        digest: blake3 of the content, hex.
        created_at: Unix time, seconds.
        expires_at: Unix time, seconds; None expires after `max_idle_days` without use.
        duration_s: Duration of a video, seconds.
        width: Width of a video, pixels.
        height: Height of a video, pixels.
    """

    id: str
    owner: str
    filename: str
    purpose: str
    suffix: str
    bytes: int
    digest: str
    created_at: float
    expires_at: float | None = None
    duration_s: float | None = None
    width: int | None = None
    height: int | None = None

    @property
    def file_type(self) -> FileType:
        return file_type_of_suffix(self.suffix)


class IncomingFile:
    """A file that is being written. It is locked, and deleted at the end unless it was added to the store.

    Attributes:
        id: Id of the future file.
        owner: Owner id.
        bytes: Number of bytes written.
    """

    def __init__(self, store: FileStore, owner: str) -> None:
        self.id, self.owner, self.bytes = f"file-{secrets.token_hex(16)}", owner, 0
        self._store, self._hash = store, blake3.blake3()
        self._head = b""
        self._kind: FileType | None = None
        self._file: BinaryIO | None = None
        self._last_space_check = 0
        # A thread may still write when its request ends.
        self._lock, self._closed = threading.Lock(), False

    @property
    def file_type(self) -> FileType:
        """Type of the file; available after the first bytes."""
        assert self._kind is not None
        return self._kind

    @property
    def path(self) -> Path:
        return self._store.directory / f"{self.id}{self.file_type.suffix}"

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        """Append to the content.

        Raises:
            ApiError: The file type is not supported, the file is too large, or the storage is full.
        """
        with self._lock:
            if self._file is not None:
                self._put(data)
                return
            self._head += data
            if len(self._head) >= HEADER_BYTES:
                self._open()

    def finish(self) -> None:
        """Flush the complete file. The type of a file below `HEADER_BYTES` is detected here."""
        with self._lock:
            if self._file is None:
                self._open()
            assert self._file is not None
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self, *, keep: bool) -> None:
        """Release the lock; delete the content unless `keep` is set."""
        with self._lock:
            self._closed = True
            if self._file is not None:
                if not keep:
                    self.path.unlink(missing_ok=True)
                self._file.close()

    def _open(self) -> None:
        """Detect the type, create the file, and write the buffered beginning."""
        head, self._head = self._head, b""
        if self._closed:
            raise ValueError(f"{self.id} is closed")
        if not head:
            raise invalid_request("The file is empty.", "file", "empty_file")
        self._kind = detect_file_type(head[:HEADER_BYTES])
        if self._kind is None:
            raise invalid_request(
                "The file is neither a video (mp4, mov, mkv, webm, avi, ts, mpg, flv) nor an image "
                "(png, jpeg, webp, bmp).",
                "file",
                "unsupported_file",
            )
        self._store.make_room(self.owner, len(head))
        self._file = _create_locked(self.path)
        self._put(head)

    def _put(self, data: bytes) -> None:
        assert self._file is not None
        if self.bytes + len(data) > self._store.max_file_bytes:
            message = f"The file is larger than {self._store.max_file_bytes / 1e6:g} MB."
            raise ApiError(413, message, param="file", code="file_too_large")
        if self.bytes + len(data) - self._last_space_check > _SPACE_CHECK_BYTES:
            self._store.make_room(self.owner, len(data))
            self._last_space_check = self.bytes
        try:
            self._file.write(data)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _storage_full() from error
            raise
        self._hash.update(data)
        self.bytes += len(data)


class FileStore:
    """Files of all keys in one directory.

    Args:
        directory: Created with mode 0700 if it is missing.
        max_bytes: Maximum size of all files together. Each running upload may exceed it by up to 16 MiB.
        max_idle_days: Days without use after which a file is deleted.
        max_file_bytes: Maximum size of one file.

    Raises:
        UserError: The directory is not writable.
    """

    def __init__(self, directory: Path | str, max_bytes: int, max_idle_days: float, max_file_bytes: int) -> None:
        self.directory, self.max_file_bytes = Path(directory), max_file_bytes
        self._max_bytes, self._max_idle_days = max_bytes, max_idle_days
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._delete_orphans()
            self.delete_expired()
        except OSError as error:
            raise UserError(
                f"cannot store uploads in {self.directory}: {error.strerror}; set files.directory"
            ) from error

    @asynccontextmanager
    async def incoming(self, owner: str) -> AsyncIterator[IncomingFile]:
        """Open a new file for writing; it is deleted at exit unless `add` was called."""
        incoming = IncomingFile(self, owner)
        try:
            yield incoming
        finally:
            incoming.close(keep=self._metadata_path(incoming.id).exists())

    def add(
        self,
        incoming: IncomingFile,
        filename: str,
        purpose: str,
        expires_s: float | None = None,
        info: VideoInfo | None = None,
    ) -> StoredFile:
        """Add a written file to the store; it expires after `expires_s` seconds at the latest."""
        now = time.time()
        stored = StoredFile(
            id=incoming.id,
            owner=incoming.owner,
            filename=filename,
            purpose=purpose,
            suffix=incoming.file_type.suffix,
            bytes=incoming.bytes,
            digest=incoming.digest,
            created_at=now,
            expires_at=None if expires_s is None else now + expires_s,
            duration_s=info.duration_s if info else None,
            width=info.width if info else None,
            height=info.height if info else None,
        )
        metadata_path = self._metadata_path(stored.id)
        partial = metadata_path.with_suffix(_PARTIAL)
        with open(partial, "w") as file:
            json.dump(asdict(stored), file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(metadata_path)
        return stored

    def get(self, id: str, owner: str) -> StoredFile | None:
        """Return a file and mark it as used; None if it is missing or has another owner."""
        if not FILE_ID_PATTERN.fullmatch(id):
            return None
        stored = self._load(self._metadata_path(id))
        if stored is None or stored.owner != owner or self._expired(stored):
            return None
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._metadata_path(id))
        return stored

    def path(self, stored: StoredFile) -> Path:
        """Return the path of the content."""
        return self.directory / f"{stored.id}{stored.suffix}"

    def list_files(self, owner: str) -> list[StoredFile]:
        """Return the files of an owner, oldest first."""
        files = [file for file in self._all() if file.owner == owner and not self._expired(file)]
        return sorted(files, key=lambda file: (file.created_at, file.id))

    def delete(self, stored: StoredFile) -> None:
        """Delete a file. Open file handles stay readable."""
        self._metadata_path(stored.id).unlink(missing_ok=True)
        self.path(stored).unlink(missing_ok=True)

    def delete_expired(self) -> None:
        """Delete all expired files."""
        for stored in self._all():
            if self._expired(stored):
                self.delete(stored)

    async def sweep_periodically(self, interval_s: float = 3600.0) -> None:
        """Delete expired files periodically, until cancelled: an idle server has no uploads to do it."""
        while True:
            try:
                await asyncio.to_thread(self.delete_expired)
            except OSError:
                log.exception("Failed to delete expired files in %s; retrying later", self.directory)
            await asyncio.sleep(interval_s)

    def make_room(self, owner: str, size: int) -> None:
        """Free space for `size` bytes: delete expired files, then this owner's least recently used ones.

        Raises:
            ApiError: 507, the storage is still full.
        """
        if self._has_room(size):
            return
        self.delete_expired()
        idle = [file for file in self.list_files(owner) if time.time() - self._used_at(file) > _MIN_IDLE_S]
        for stored in sorted(idle, key=self._used_at):
            if self._has_room(size):
                return
            self.delete(stored)
        if not self._has_room(size):
            raise _storage_full()

    def _has_room(self, size: int) -> bool:
        sizes = [stored_size for _, stored_size in self._contents()]
        return sum(sizes) + size <= self._max_bytes and len(sizes) < _MAX_FILES

    def _contents(self) -> Iterator[tuple[str, int]]:
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if entry.name.startswith("file-") and not entry.name.endswith((_METADATA, _PARTIAL)):
                    with contextlib.suppress(FileNotFoundError):
                        yield entry.name, entry.stat().st_size

    def _all(self) -> Iterator[StoredFile]:
        for path in self.directory.glob(f"file-*{_METADATA}"):
            if (stored := self._load(path)) is not None:
                yield stored

    def _load(self, path: Path) -> StoredFile | None:
        try:
            return StoredFile(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            log.warning("Deleting invalid file metadata %s: %s", path, error)
            path.unlink(missing_ok=True)
            return None

    def _metadata_path(self, id: str) -> Path:
        return self.directory / f"{id}{_METADATA}"

    def _used_at(self, stored: StoredFile) -> float:
        try:
            return self._metadata_path(stored.id).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _expired(self, stored: StoredFile) -> bool:
        if stored.expires_at is not None and time.time() >= stored.expires_at:
            return True
        return time.time() - self._used_at(stored) > self._max_idle_days * _DAY_S

    def _delete_orphans(self) -> None:
        """Delete files of crashed servers: content without metadata and without a lock."""
        for name in [name for name, _ in self._contents()]:
            path = self.directory / name
            with contextlib.suppress(OSError), open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: another process is writing it
                path.with_suffix(_PARTIAL).unlink(missing_ok=True)
                if not path.with_suffix(_METADATA).exists():
                    path.unlink(missing_ok=True)
        for partial in self.directory.glob(f"file-*{_PARTIAL}"):
            if not any(partial.with_suffix(file_type.suffix).exists() for file_type in FILE_TYPES):
                partial.unlink(missing_ok=True)


def _create_locked(path: Path) -> BinaryIO:
    """Create and lock a new file. Retry if a starting server deleted it as an orphan before the lock."""
    while True:
        file = os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600), "w+b")
        fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()


def _storage_full() -> ApiError:
    return ApiError(507, "The storage is full; delete some files.", code="storage_full")
