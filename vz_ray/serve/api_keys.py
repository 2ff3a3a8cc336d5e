"""API keys: secrets of 256 random bits of which the server keeps hashes alone.

A key is shown once, when it is made. Two one-way functions of it are kept: the
hash of the key itself, and the hash of its *session secret*, which is what a
browser's cookie holds in place of the key. So a copy of the keys file opens
nothing, a stolen cookie is not the key, and its expiry cannot be put off: it is
signed with the key's hash, which neither has. Fast hashes suffice, since such
keys cannot be guessed one by one.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vz_ray.utils.atomic_files import write_atomic
from vz_ray.utils.errors import UserError

log = logging.getLogger(__name__)

KEY_PREFIX = "vz-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{128}")
_LONGEST = 256
"""Characters of what is presented as a key; ours have 46."""
_DAY_S = 86400.0


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key, without its secret.

    Attributes:
        name: For people.
        hash: 128 hex digits: sha256 of the key, then sha256 of its session secret.
        created_at: Seconds since 1970.
        expires_at: Seconds since 1970; None is never.
    """

    name: str
    hash: str
    created_at: float = 0.0
    expires_at: float | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"a key is named {self.name!r}; use letters, digits, dots and dashes, 64 at most"
            )
        if not _HASH.fullmatch(self.hash):
            raise ValueError(f"the hash of key {self.name} has not 128 hex digits; `vz-ray keys` makes it")

    @property
    def id(self) -> str:
        """Who owns what was uploaded with it; another key of the same name has another."""
        return self.hash[:32]

    def is_expired(self, now: float) -> bool:
        return self.expires_at is not None and now >= self.expires_at


def generate_key(name: str, days: float | None = None) -> tuple[str, ApiKey]:
    """The secret, which is not kept anywhere, and what is kept of it."""
    secret, now = KEY_PREFIX + secrets.token_urlsafe(32), time.time()
    return secret, ApiKey(name, _hash(secret), now, None if days is None else now + days * _DAY_S)


class ApiKeyStore:
    """The keys that open a server: of a file, read again whenever it changes, and of the environment.

    Args:
        file: Written by `add` and `revoke`; None for keys of the environment alone.
        environment: `NAME:HASH` or `NAME:HASH:EXPIRY`, with spaces or commas between.

    Raises:
        UserError: The file is missing or broken, or may be written by others, or the environment is broken.
    """

    def __init__(self, file: Path | str | None, environment: str = "") -> None:
        self._file = Path(file) if file else None
        self._fixed = _of_environment(environment)
        self._seen: tuple[int, ...] = ()
        self._read: tuple[ApiKey, ...] = ()
        if self._file is not None:
            self._seen, self._read = _stamp(self._file), load_keys(self._file)

    @classmethod
    def from_config(cls, file: str, variable: str, environment: Mapping[str, str]) -> ApiKeyStore | None:
        """The ring that a configuration asks for; None where there are no keys at all.

        Raises:
            UserError: As the ring itself.
        """
        told = environment.get(variable, "")
        return cls(file or None, told) if file or told.strip() else None

    def keys(self) -> tuple[ApiKey, ...]:
        """All that are not revoked; none of a file that can no longer be read, so that it fails closed."""
        if self._file is not None and (stamp := _stamp(self._file)) != self._seen:
            self._seen = stamp
            try:
                self._read = load_keys(self._file)
            except UserError as error:
                log.error("no key of the file is valid any more: %s", error)
                self._read = ()
        return self._fixed + self._read

    def verify(self, presented: str) -> ApiKey | None:
        """The key that this is the secret of, unless it is revoked or expired."""
        if len(presented) > _LONGEST or not presented.isascii():
            return None
        return self._valid(_digest(presented), 0)

    def create_session(self, presented: str, hours: float) -> tuple[str, ApiKey] | None:
        """A cookie for whoever presents a key, valid for `hours` and while the key is."""
        key = self.verify(presented)
        if key is None:
            return None
        told = f"{_session_secret(presented)}.{int(time.time() + hours * 3600)}"
        return f"{told}.{_sign(key, told)}", key

    def verify_session(self, cookie: str) -> ApiKey | None:
        """The key that a cookie was given for, unless either has ended."""
        told, _, signature = cookie.rpartition(".")
        secret, _, expires = told.partition(".")
        if len(cookie) > _LONGEST or not cookie.isascii() or not re.fullmatch(r"\d{1,12}", expires):
            return None
        key = self._valid(_digest(secret), 64)
        if key is None or not hmac.compare_digest(_sign(key, told), signature):
            return None
        return key if time.time() < int(expires) else None

    def _valid(self, digest: str, start: int) -> ApiKey | None:
        found = None
        for key in self.keys():  # all of them, so that the time taken says nothing
            if hmac.compare_digest(key.hash[start : start + 64], digest):
                found = key
        return None if found is None or found.is_expired(time.time()) else found


def add_key(file: Path, key: ApiKey) -> None:
    """Adds `key` to a file, which is made if it is missing.

    Raises:
        UserError: It has a key of that name, or is no file of keys.
    """
    with _alone(file):
        keys = load_keys(file) if file.exists() else ()
        if any(other.name == key.name for other in keys):
            raise UserError(f"{file} has a key named {key.name}: revoke it first, or choose another name")
        _write(file, (*keys, key))


def revoke_key(file: Path, name: str) -> None:
    """Takes a key out of a file; running servers notice with the next request.

    Raises:
        UserError: It has no such key.
    """
    with _alone(file):
        keys = load_keys(file)
        if all(key.name != name for key in keys):
            names = ", ".join(key.name for key in keys) or "none"
            raise UserError(f"{file} has no key named {name}; it has {names}")
        _write(file, tuple(key for key in keys if key.name != name))


def load_keys(file: Path) -> tuple[ApiKey, ...]:
    """The keys of a file, expired ones included.

    Raises:
        UserError: It is missing or broken, or others may write to it.
    """
    try:
        if os.stat(file).st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UserError(f"{file} may be written by others, who could add keys: chmod 600 {file}")
        found: Any = json.loads(file.read_bytes())
        return tuple(ApiKey(**entry) for entry in found["keys"])
    except FileNotFoundError as error:
        raise UserError(f"there are no keys at {file}: make one with `vz-ray keys create NAME`") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no file of keys ({error}); `vz-ray keys create` makes one") from error


def format_key(key: ApiKey) -> str:
    """A key for people: name, when it was made, when it expires."""
    until = "never expires" if key.expires_at is None else f"expires {_when(key.expires_at)}"
    return f"{key.name}  made {_when(key.created_at)}, {'expired' if key.is_expired(time.time()) else until}"


def format_key_env(key: ApiKey) -> str:
    """A key as the environment variable takes it; no secret."""
    return f"{key.name}:{key.hash}" + ("" if key.expires_at is None else f":{_when(key.expires_at)}")


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _of_environment(text: str) -> tuple[ApiKey, ...]:
    keys = []
    for place, entry in enumerate(re.split(r"[\s,]+", text.strip()) if text.strip() else []):
        name, _, rest = entry.partition(":")
        digest, _, expiry = rest.partition(":")
        try:
            until = datetime.fromisoformat(expiry) if expiry else None
            if until is not None and until.tzinfo is None:
                until = until.replace(tzinfo=UTC)
            keys.append(ApiKey(name, digest, expires_at=until.timestamp() if until else None))
        except ValueError:
            raise UserError(
                f"entry {place + 1} of the keys in the environment is not NAME:HASH or NAME:HASH:EXPIRY; "
                "`vz-ray keys list --hashes` prints such entries"
            ) from None  # what is there in place of a hash may be a key
    return tuple(keys)


def _hash(secret: str) -> str:
    return _digest(secret) + _digest(_session_secret(secret))


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _session_secret(secret: str) -> str:
    return hmac.new(secret.encode(), b"vz_ray session", hashlib.sha256).hexdigest()


def _sign(key: ApiKey, told: str) -> str:
    return hmac.new(key.hash[:64].encode(), told.encode(), hashlib.sha256).hexdigest()


def _stamp(file: Path) -> tuple[int, ...]:
    try:
        status = os.stat(file)
    except OSError:
        return ()
    return (status.st_mtime_ns, status.st_ino, status.st_size, status.st_mode)


def _write(file: Path, keys: tuple[ApiKey, ...]) -> None:
    before = os.umask(0o177)  # the file is nobody else's from the start
    try:
        write_atomic(file, (json.dumps({"keys": [asdict(key) for key in keys]}, indent=2) + "\n").encode())
    finally:
        os.umask(before)


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """One process changes a file at a time; the lock is on its directory, so that nothing is left."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"{file.parent} cannot hold a file of keys: {error.strerror}") from error
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)
