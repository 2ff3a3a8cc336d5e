"""API keys: secrets of 256 random bits. The server stores hashes only.

A key is printed once, when it is created. The keys file stores two hashes: the hash of the key, and the hash
of its *session secret*. A browser's cookie contains the session secret instead of the key.

- A copy of the keys file does not authenticate.
- A stolen cookie does not reveal the key, and its expiry cannot be extended: the key's hash signs it.

A fast hash is sufficient, because 256 random bits cannot be guessed.
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
_MAX_CHARS = 256
"""Maximum length of a presented key or cookie. A key has 46 characters."""
_DAY_S = 86400.0


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key, without its secret.

    Attributes:
        name: Display name.
        hash: 128 hex digits: sha256 of the key, then sha256 of its session secret.
        created_at: Unix time, seconds.
        expires_at: Unix time, seconds; None never expires.
    """

    name: str
    hash: str
    created_at: float = 0.0
    expires_at: float | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"the key name is {self.name!r}; use up to 64 letters, digits, dots and dashes")
        if not _HASH.fullmatch(self.hash):
            raise ValueError(f"the hash of key {self.name} must have 128 hex digits; create it with `vz-ray keys`")

    @property
    def id(self) -> str:
        """Owner id of the key's uploads. Another key with the same name has another id."""
        return self.hash[:32]

    def is_expired(self, now: float) -> bool:
        return self.expires_at is not None and now >= self.expires_at


def generate_key(name: str, days: float | None = None) -> tuple[str, ApiKey]:
    """Return the secret, which is not stored, and the key with its hash."""
    secret, now = KEY_PREFIX + secrets.token_urlsafe(32), time.time()
    return secret, ApiKey(name, _hash(secret), now, None if days is None else now + days * _DAY_S)


class ApiKeyStore:
    """Valid keys of a server, from a file that is reloaded when it changes and from the environment.

    Args:
        file: Keys file; None uses keys of the environment only.
        environment: `NAME:HASH` or `NAME:HASH:EXPIRY` entries, separated by spaces or commas.

    Raises:
        UserError: The file is missing, invalid or writable by other users, or `environment` is invalid.
    """

    def __init__(self, file: Path | str | None, environment: str = "") -> None:
        self._file = Path(file) if file else None
        self._environment_keys = _parse_environment(environment)
        self._file_stamp: tuple[int, ...] = ()
        self._file_keys: tuple[ApiKey, ...] = ()
        if self._file is not None:
            self._file_stamp, self._file_keys = _stamp(self._file), load_keys(self._file)

    @classmethod
    def from_config(cls, file: str, variable: str, environment: Mapping[str, str]) -> ApiKeyStore | None:
        """Create the store from a keys file and an environment variable; None if neither is set.

        Raises:
            UserError: See the class.
        """
        entries = environment.get(variable, "")
        return cls(file or None, entries) if file or entries.strip() else None

    def keys(self) -> tuple[ApiKey, ...]:
        """Return all keys. If the file became unreadable, its keys are invalid (fail closed)."""
        if self._file is not None and (stamp := _stamp(self._file)) != self._file_stamp:
            self._file_stamp = stamp
            try:
                self._file_keys = load_keys(self._file)
            except UserError as error:
                log.error("Rejecting all keys of the file: %s", error)
                self._file_keys = ()
        return self._environment_keys + self._file_keys

    def verify(self, presented: str) -> ApiKey | None:
        """Return the key of a secret; None if it is unknown, revoked or expired."""
        if len(presented) > _MAX_CHARS or not presented.isascii():
            return None
        return self._find_valid(_digest(presented), 0)

    def create_session(self, presented: str, hours: float) -> tuple[str, ApiKey] | None:
        """Exchange a secret for a session cookie that is valid for `hours`, and no longer than the key."""
        key = self.verify(presented)
        if key is None:
            return None
        payload = f"{_session_secret(presented)}.{int(time.time() + hours * 3600)}"
        return f"{payload}.{_sign(key, payload)}", key

    def verify_session(self, cookie: str) -> ApiKey | None:
        """Return the key of a session cookie; None if the cookie or the key is invalid or expired."""
        payload, _, signature = cookie.rpartition(".")
        secret, _, expires = payload.partition(".")
        if len(cookie) > _MAX_CHARS or not cookie.isascii() or not re.fullmatch(r"\d{1,12}", expires):
            return None
        key = self._find_valid(_digest(secret), 64)
        if key is None or not hmac.compare_digest(_sign(key, payload), signature):
            return None
        return key if time.time() < int(expires) else None

    def _find_valid(self, digest: str, start: int) -> ApiKey | None:
        match = None
        for key in self.keys():  # compare with all keys: constant time
            if hmac.compare_digest(key.hash[start : start + 64], digest):
                match = key
        return None if match is None or match.is_expired(time.time()) else match


def add_key(file: Path, key: ApiKey) -> None:
    """Add `key` to a keys file; a missing file is created.

    Raises:
        UserError: The file has a key with the same name, or is not a keys file.
    """
    with _exclusive(file):
        keys = load_keys(file) if file.exists() else ()
        if any(other.name == key.name for other in keys):
            raise UserError(f"{file} already has a key named {key.name}; revoke it first, or use another name")
        _write(file, (*keys, key))


def revoke_key(file: Path, name: str) -> None:
    """Remove a key from a keys file. Running servers reject it from the next request on.

    Raises:
        UserError: The file does not contain the key.
    """
    with _exclusive(file):
        keys = load_keys(file)
        if all(key.name != name for key in keys):
            names = ", ".join(key.name for key in keys) or "none"
            raise UserError(f"{file} has no key named {name}; existing keys: {names}")
        _write(file, tuple(key for key in keys if key.name != name))


def load_keys(file: Path) -> tuple[ApiKey, ...]:
    """Load a keys file, including expired keys.

    Raises:
        UserError: The file is missing, invalid or writable by other users.
    """
    try:
        if os.stat(file).st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UserError(f"{file} is writable by other users, which could add keys; run chmod 600 {file}")
        content: Any = json.loads(file.read_bytes())
        return tuple(ApiKey(**entry) for entry in content["keys"])
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist; create a key with `vz-ray keys create NAME`") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a keys file ({error}); create one with `vz-ray keys create`") from error


def format_key(key: ApiKey) -> str:
    """Format a key for the terminal: name, creation and expiry time."""
    expiry_time = "never expires" if key.expires_at is None else f"expires {_iso_time(key.expires_at)}"
    expiry = "expired" if key.is_expired(time.time()) else expiry_time
    return f"{key.name}  created {_iso_time(key.created_at)}, {expiry}"


def format_key_env(key: ApiKey) -> str:
    """Format a key for the environment variable; contains no secret."""
    return f"{key.name}:{key.hash}" + ("" if key.expires_at is None else f":{_iso_time(key.expires_at)}")


def _iso_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _parse_environment(text: str) -> tuple[ApiKey, ...]:
    keys = []
    for index, entry in enumerate(re.split(r"[\s,]+", text.strip()) if text.strip() else []):
        name, _, hash_and_expiry = entry.partition(":")
        digest, _, expiry = hash_and_expiry.partition(":")
        try:
            expiry_time = datetime.fromisoformat(expiry) if expiry else None
            if expiry_time is not None and expiry_time.tzinfo is None:
                expiry_time = expiry_time.replace(tzinfo=UTC)
            keys.append(ApiKey(name, digest, expires_at=expiry_time.timestamp() if expiry_time else None))
        except ValueError:
            raise UserError(
                f"entry {index + 1} of the keys in the environment must be NAME:HASH or NAME:HASH:EXPIRY; "
                "print entries with `vz-ray keys list --hashes`"
            ) from None  # the invalid value may be a secret
    return tuple(keys)


def _hash(secret: str) -> str:
    return _digest(secret) + _digest(_session_secret(secret))


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _session_secret(secret: str) -> str:
    return hmac.new(secret.encode(), b"vz_ray session", hashlib.sha256).hexdigest()


def _sign(key: ApiKey, payload: str) -> str:
    return hmac.new(key.hash[:64].encode(), payload.encode(), hashlib.sha256).hexdigest()


def _stamp(file: Path) -> tuple[int, ...]:
    try:
        status = os.stat(file)
    except OSError:
        return ()
    return (status.st_mtime_ns, status.st_ino, status.st_size, status.st_mode)


def _write(file: Path, keys: tuple[ApiKey, ...]) -> None:
    old_umask = os.umask(0o177)  # never readable by other users
    try:
        write_atomic(file, (json.dumps({"keys": [asdict(key) for key in keys]}, indent=2) + "\n").encode())
    finally:
        os.umask(old_umask)


@contextmanager
def _exclusive(file: Path) -> Iterator[None]:
    """Lock a keys file for writing. The lock is on its directory, so no lock file remains."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"cannot use {file.parent} for a keys file: {error.strerror}") from error
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)
