"""Uploaded files on disk: each with its facts beside it, or not there at all.

    file-<hex>.mp4    the content
    file-<hex>.json   what is known of it; written last, so that with it the file exists

Several servers may share the directory. Who writes a file holds a lock on it
until its facts are written; one without facts and without a lock was left by a
server that died, and is deleted at the next start, as is media sent inline.
A file is in use when its facts were touched lately.
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

from vz_ray.serve.api_errors import ApiError, invalid_request, too_large
from vz_ray.serve.file_types import FILE_TYPES, HEADER_BYTES, FileType, detect_file_type, file_type_of_suffix
from vz_ray.utils.errors import UserError
from vz_ray.video.frame import VideoInfo

log = logging.getLogger(__name__)

FILE_ID_PATTERN = re.compile(r"file-[0-9a-f]{32}")
_DAY_S = 86400.0
_MOST_FILES = 10_000
"""Files of all keys together; as many as a page of the list holds at most."""
_ROOM_STEP = 16 * 2**20
"""Bytes that are written before the directory is measured again."""
_IN_USE_S = 3600.0
"""A file that was used this lately is not dropped to make room."""
_FACTS, _PART = ".json", ".part"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file.

    Attributes:
        id: `file-` and 128 random bits.
        owner: Id of the key that it was uploaded with.
        filename: What the client calls it.
        purpose: What the client says it is for.
        suffix: What its name ends with here; says what kind it is.
        bytes: Size.
        digest: blake3 of the content, hex.
        created_at: Seconds since 1970.
        expires_at: Seconds since 1970, whether it is used or not; None goes by use alone.
        duration_s: Of a video, seconds.
        width: Of a video, pixels.
        height: Of a video, pixels.
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
    """A file that is being written; it is locked, and gone at the end unless it was kept.

    Attributes:
        id: What it will be called.
        bytes: Written so far.
    """

    def __init__(self, store: FileStore, owner: str) -> None:
        self.id, self.owner, self.bytes = f"file-{secrets.token_hex(16)}", owner, 0
        self._store, self._hash = store, blake3.blake3()
        self._head = b""
        self._kind: FileType | None = None
        self._file: BinaryIO | None = None
        self._measured_at = 0
        self._turn, self._closed = threading.Lock(), False  # a thread may still write when its request ends

    @property
    def file_type(self) -> FileType:
        """What it is; known once something was written."""
        assert self._kind is not None
        return self._kind

    @property
    def path(self) -> Path:
        return self._store.directory / f"{self.id}{self.file_type.suffix}"

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        """Adds to the content.

        Raises:
            ApiError: It is neither video nor image, or too large, or there is no room.
        """
        with self._turn:
            if self._file is None:
                self._head += data
                if len(self._head) < HEADER_BYTES:
                    return
                data, self._head = self._head, b""
                self._begin(data)
            self._put(data)

    def finish(self) -> None:
        """All of it was written; a short file is only now looked at."""
        with self._turn:
            if self._file is None:
                data, self._head = self._head, b""
                self._begin(data)
                self._put(data)
            assert self._file is not None
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self, *, keep: bool) -> None:
        """Ends the lock; deletes the content unless it is kept."""
        with self._turn:
            self._closed = True
            if self._file is not None:
                if not keep:
                    self.path.unlink(missing_ok=True)
                self._file.close()

    def _begin(self, head: bytes) -> None:
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
        self._file = _created(self.path)

    def _put(self, data: bytes) -> None:
        assert self._file is not None
        if self.bytes + len(data) > self._store.max_file_bytes:
            raise too_large(
                f"The file is larger than {self._store.max_file_bytes / 1e6:g} MB.", "file", "file_too_large"
            )
        if self.bytes + len(data) - self._measured_at > _ROOM_STEP:
            self._store.make_room(self.owner, len(data))
            self._measured_at = self.bytes
        try:
            self._file.write(data)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _full() from error
            raise
        self._hash.update(data)
        self.bytes += len(data)


class FileStore:
    """The files of all keys, in one directory.

    Args:
        directory: Made if it is missing, for this user alone.
        most_bytes: Of all files together; exceeded by 16 MB at most for each upload in progress.
        days: A file is deleted when it was not used for as many.
        max_file_bytes: Largest file.

    Raises:
        UserError: The directory cannot be written.
    """

    def __init__(
        self, directory: Path | str, max_bytes: int, max_idle_days: float, max_file_bytes: int
    ) -> None:
        self.directory, self.max_file_bytes = Path(directory), max_file_bytes
        self._most, self._days = max_bytes, max_idle_days
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._drop_orphans()
            self.delete_expired()
        except OSError as error:
            raise UserError(
                f"uploads cannot be kept in {self.directory}: {error.strerror}; set files.directory"
            ) from error

    @asynccontextmanager
    async def incoming(self, owner: str) -> AsyncIterator[IncomingFile]:
        """A file to write; it is gone after the block unless `add` was called."""
        incoming = IncomingFile(self, owner)
        try:
            yield incoming
        finally:
            incoming.close(keep=self._facts(incoming.id).exists())

    def add(
        self,
        incoming: IncomingFile,
        filename: str,
        purpose: str,
        expires_s: float | None = None,
        info: VideoInfo | None = None,
    ) -> StoredFile:
        """Keeps what was written; from now on it exists, for `expires_s` seconds at most."""
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
        facts = self._facts(stored.id)
        part = facts.with_suffix(_PART)
        with open(part, "w") as file:
            json.dump(asdict(stored), file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(facts)
        return stored

    def get(self, id: str, owner: str) -> StoredFile | None:
        """A file of this owner, which counts as used now; None for another's as for one that is not there."""
        if not FILE_ID_PATTERN.fullmatch(id):
            return None
        stored = self._load(self._facts(id))
        if stored is None or stored.owner != owner or self._expired(stored):
            return None
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._facts(id))
        return stored

    def path(self, stored: StoredFile) -> Path:
        """Where its content is."""
        return self.directory / f"{stored.id}{stored.suffix}"

    def list_files(self, owner: str) -> list[StoredFile]:
        """The files of an owner, oldest first."""
        mine = [one for one in self._all() if one.owner == owner and not self._expired(one)]
        return sorted(mine, key=lambda one: (one.created_at, one.id))

    def delete(self, stored: StoredFile) -> None:
        """Whoever has it open reads on."""
        self._facts(stored.id).unlink(missing_ok=True)
        self.path(stored).unlink(missing_ok=True)

    def delete_expired(self) -> None:
        """Deletes what has expired."""
        for stored in self._all():
            if self._expired(stored):
                self.delete(stored)

    async def sweep_periodically(self, interval_s: float = 3600.0) -> None:
        """Sweeps now and then until cancelled; who serves runs it, since an idle server gets no uploads."""
        while True:
            try:
                await asyncio.to_thread(self.delete_expired)
            except OSError:
                log.exception("expired files in %s could not be deleted; this is tried again", self.directory)
            await asyncio.sleep(interval_s)

    def make_room(self, owner: str, size: int) -> None:
        """Deletes what has expired and, if that is not enough, what this owner used least recently.

        Raises:
            ApiError: 507; there is no room all the same.
        """
        if self._used() + size <= self._most and self._count() < _MOST_FILES:
            return
        self.delete_expired()
        idle = [one for one in self.list_files(owner) if time.time() - self._used_at(one) > _IN_USE_S]
        for stored in sorted(idle, key=self._used_at):
            if self._used() + size <= self._most and self._count() < _MOST_FILES:
                return
            self.delete(stored)
        if self._used() + size > self._most or self._count() >= _MOST_FILES:
            raise _full()

    def _used(self) -> int:
        return sum(size for _, size in self._contents())

    def _count(self) -> int:
        return sum(1 for _ in self._contents())

    def _contents(self) -> Iterator[tuple[str, int]]:
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if entry.name.startswith("file-") and not entry.name.endswith((_FACTS, _PART)):
                    with contextlib.suppress(FileNotFoundError):
                        yield entry.name, entry.stat().st_size

    def _all(self) -> Iterator[StoredFile]:
        for path in self.directory.glob(f"file-*{_FACTS}"):
            if (stored := self._load(path)) is not None:
                yield stored

    def _load(self, path: Path) -> StoredFile | None:
        try:
            return StoredFile(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            log.warning("%s is damaged, and its file is given up: %s", path, error)
            path.unlink(missing_ok=True)
            return None

    def _facts(self, id: str) -> Path:
        return self.directory / f"{id}{_FACTS}"

    def _used_at(self, stored: StoredFile) -> float:
        try:
            return self._facts(stored.id).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _expired(self, stored: StoredFile) -> bool:
        if stored.expires_at is not None and time.time() >= stored.expires_at:
            return True
        return time.time() - self._used_at(stored) > self._days * _DAY_S

    def _drop_orphans(self) -> None:
        """Deletes what a server that died had begun to write: contents without facts that nobody holds."""
        for name in [name for name, _ in self._contents()]:
            path = self.directory / name
            with contextlib.suppress(OSError), open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: it is being written
                path.with_suffix(_PART).unlink(missing_ok=True)
                if not path.with_suffix(_FACTS).exists():
                    path.unlink(missing_ok=True)
        for part in self.directory.glob(f"file-*{_PART}"):
            if not any(part.with_suffix(kind.suffix).exists() for kind in FILE_TYPES):
                part.unlink(missing_ok=True)


def _created(path: Path) -> BinaryIO:
    """A new file, locked; made again if a server that started just then has taken it for an orphan."""
    while True:
        file = os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600), "w+b")
        fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()


def _full() -> ApiError:
    return ApiError(
        507, "There is no room for this file; delete some of yours.", "server_error", code="storage_full"
    )
