"""Videos at a URL, as local files: fetched once per machine, within limits of size and time.

http and https go through `address`, which connects to public hosts only;
every other scheme is an object store of fsspec's, read with the machine's own
credentials and therefore refused unless it was allowed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import blake3
import httpcore

from vz_ray.video.errors import DownloadFailedError, SourceNotAllowedError, VideoLimitExceededError
from vz_ray.video.public_network import PublicNetworkBackend, is_ip_literal, is_public_literal

HTTP_SCHEMES = frozenset({"http", "https"})
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 5
_CHUNK = 1 << 20
_SILENCE_S = 30.0
"""A server may be silent for this long."""
_POLL_S = 0.1
_AGENT = b"vz_ray"
_LONGEST_URL = 4096
"""Characters; signed URLs of object stores have up to about 2,000."""
_SHOWN = 200
_PLAIN = re.compile(r"[!-\[\]-~]+")
"""Printable ASCII without blanks and without the backslash, which some take for a slash."""


@dataclass(frozen=True, slots=True)
class DownloadRules:
    """Which URLs are fetched, and how much of them.

    Attributes:
        schemes: Allowed, such as `https` or `s3`.
        hosts: The only hosts (or buckets) allowed; empty allows all.
        private_hosts: Hosts that may have addresses that are not public.
        max_file_bytes: Largest file.
        timeout_s: Longest download.
    """

    schemes: tuple[str, ...] = ("http", "https")
    hosts: tuple[str, ...] = ()
    private_hosts: tuple[str, ...] = ()
    max_file_bytes: int = 8 * 2**30
    timeout_s: float = 600.0


class DownloadCache:
    """Files fetched from URLs, the least recently used dropped above a size.

    A file that is open keeps its content when it is dropped. What a URL holds
    is taken not to change while it is kept.

    Args:
        root: Made if it is missing.
        most_bytes: Size cap; the file fetched last is kept even if it alone is larger.
        rules: What may be fetched.
    """

    def __init__(self, root: Path | str, max_bytes: int, rules: DownloadRules) -> None:
        self._root, self._most, self._rules = Path(root), max_bytes, rules

    def fetch(self, url: str) -> Path:
        """The file that holds what is at `url`, fetched if it is not there yet.

        Raises:
            SourceRefused: The rules, or an address on the way, do not allow it.
            OverLimit: It is too large.
            DownloadFailed: It is not there, or did not arrive in time.
        """
        check_url(url, self._rules)
        path = self._root / (blake3.blake3(url.encode()).hexdigest() + Path(urlsplit(url).path).suffix[:8])
        until = time.monotonic() + self._rules.timeout_s
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._alone(path, url, until):
                if not path.exists():
                    self._fetch(url, path, until)
                    self._sweep(path)
                os.utime(path)
        except OSError as error:
            raise DownloadFailedError(
                f"{url}: cannot be kept in {self._root}: {error.strerror or error}",
                "the video could not be fetched",
            ) from error
        return path

    def _fetch(self, url: str, path: Path, until: float) -> None:
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with open(part, "wb") as file:
                size = 0
                for chunk in self._content(url, until):
                    size += len(chunk)
                    self._check_size(url, size)
                    if time.monotonic() > until:
                        raise DownloadFailedError(
                            f"{url}: {size / 1e6:.0f} MB arrived in {self._rules.timeout_s:g} s "
                            "(timeouts.download_s), then it was given up",
                            "the video took too long to fetch",
                        )
                    file.write(chunk)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def _check_size(self, url: str, size: int) -> None:
        if size > self._rules.max_file_bytes:
            raise VideoLimitExceededError(
                f"{url}: over the limit of {self._rules.max_file_bytes / 2**30:g} GB (clips.max_download_gib)",
                "the video file is too large",
            )

    def _content(self, url: str, until: float) -> Iterator[bytes]:
        if urlsplit(url).scheme in HTTP_SCHEMES:
            return self._http(url, until)
        return self._object(url)

    def _http(self, url: str, until: float) -> Iterator[bytes]:
        backend = PublicNetworkBackend(self._rules.private_hosts)
        with httpcore.ConnectionPool(network_backend=backend) as pool:
            for _ in range(_MOST_REDIRECTS + 1):
                wait = min(_SILENCE_S, max(0.1, until - time.monotonic()))
                limits = {"timeout": {"connect": wait, "read": wait, "write": wait, "pool": wait}}
                headers = [(b"user-agent", _AGENT), (b"accept-encoding", b"identity")]
                try:
                    with pool.stream("GET", url, headers=headers, extensions=limits) as response:
                        if response.status not in _REDIRECTS:
                            yield from self._body(url, response)
                            return
                        onward = _header(response, b"location")
                except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError) as error:
                    raise DownloadFailedError(
                        f"{url}: {type(error).__name__}: {error or 'no answer in time'}",
                        "the video could not be fetched",
                    ) from error
                url = self._onward(url, onward)
        raise DownloadFailedError(
            f"{url}: more than {_MOST_REDIRECTS} redirects", "the video could not be fetched"
        )

    def _onward(self, url: str, onward: str | None) -> str:
        if not onward:
            raise DownloadFailedError(f"{url}: redirects to nowhere", "the video could not be fetched")
        target = urljoin(url, onward)
        if urlsplit(url).scheme == "https" and urlsplit(target).scheme == "http":
            raise SourceNotAllowedError(
                f"{url}: redirects from https to {target}", "the video's address cannot be opened"
            )
        if urlsplit(target).scheme not in HTTP_SCHEMES:
            raise SourceNotAllowedError(
                f"{url}: redirects to {target}", "the video's address cannot be opened"
            )
        check_url(target, self._rules)
        return target

    def _body(self, url: str, response: httpcore.Response) -> Iterator[bytes]:
        if response.status != 200:
            raise DownloadFailedError(
                f"{url}: the server answers with status {response.status}", "the video could not be fetched"
            )
        told = _header(response, b"content-length")
        if told is not None and told.isdigit():
            self._check_size(url, int(told))
        arrived = 0
        for chunk in response.iter_stream():
            arrived += len(chunk)
            yield chunk
        if told is not None and told.isdigit() and arrived != int(told):
            raise DownloadFailedError(
                f"{url}: {arrived} bytes arrived of {told}", "the video could not be fetched completely"
            )

    def _object(self, url: str) -> Iterator[bytes]:
        import fsspec

        try:
            with fsspec.open(url, "rb") as file:
                stream: Any = file
                while chunk := stream.read(_CHUNK):
                    yield chunk
        except ImportError as error:
            raise SourceNotAllowedError(
                f"{url}: {error}; install it to read from there", "the video's address cannot be opened"
            ) from error
        except FileNotFoundError as error:
            raise DownloadFailedError(f"{url}: there is no such object", "the video is missing") from error
        except Exception as error:  # each object store has errors of its own
            raise DownloadFailedError(
                f"{url}: {type(error).__name__}: {error}", "the video could not be fetched"
            ) from error

    @contextlib.contextmanager
    def _alone(self, path: Path, url: str, until: float) -> Iterator[None]:
        """One process fetches, the others wait for it."""
        with open(path.with_name(f"{path.name}.lock"), "wb") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise DownloadFailedError(
                            f"{url}: another process has been fetching it for {self._rules.timeout_s:g} s",
                            "the video took too long to fetch",
                        ) from None
                    time.sleep(_POLL_S)
            yield

    def _sweep(self, keep: Path) -> None:
        """Drops what was not used for longest; the lock files, which are empty, stay."""
        files = [p for p in self._root.iterdir() if p.suffix not in (".lock", ".part") and p != keep]
        sized = sorted((p.stat().st_mtime, p.stat().st_size, p) for p in files)
        left = keep.stat().st_size + sum(size for _, size, _ in sized)
        for _, size, path in sized:
            if left <= self._most:
                return
            path.unlink(missing_ok=True)
            left -= size


def check_url(url: str, rules: DownloadRules) -> None:
    """What a URL itself says against it; nothing is looked up.

    Raises:
        SourceRefused: The rules do not allow it, or it is written so that two readers could differ on it.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise _refused(f"{url[:_SHOWN]}: not a URL ({error})") from error
    if parts.username is not None or parts.password is not None:
        raise _refused(f"{host}: a URL with a user name or password in it")
    if len(url) > _LONGEST_URL:
        raise _refused(f"{url[:_SHOWN]}: a URL of {len(url)} characters; {_LONGEST_URL} are the most")
    if not _PLAIN.fullmatch(url):
        raise _refused(f"{url!r}: a URL with signs that must be percent-encoded, or a host not in ASCII")
    if parts.scheme not in rules.schemes:
        raise _refused(
            f"{url}: the scheme {parts.scheme} is not among {', '.join(rules.schemes)} (clips.allowed_schemes)"
        )
    if not host:
        raise _refused(f"{url}: a URL without a host")
    if rules.hosts and host not in rules.hosts:
        raise _refused(f"{url}: the host {host} is not among {', '.join(rules.hosts)} (clips.allowed_hosts)")
    literal = parts.scheme in HTTP_SCHEMES and is_ip_literal(host)
    if literal and host not in rules.private_hosts and not is_public_literal(host):
        raise _refused(
            f"{url}: the host {host} is an address that is not public, or not written as addresses usually "
            "are; if videos are meant to come from there, add it to clips.allowed_private_hosts"
        )


def _refused(why: str) -> SourceNotAllowedError:
    return SourceNotAllowedError(why, "the video's address cannot be opened")


def _header(response: httpcore.Response, name: bytes) -> str | None:
    for key, value in response.headers:
        if key.lower() == name:
            return bytes(value).decode("latin-1")
    return None
