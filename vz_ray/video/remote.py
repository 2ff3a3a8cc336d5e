"""Downloads of videos: each URL once per machine, with size and time limits.

`http` and `https` use `public_network`, which connects to public hosts only. Other schemes are
object stores, read by fsspec with the credentials of the machine and rejected unless allowed.
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
_MAX_REDIRECTS = 5
_CHUNK_BYTES = 1 << 20
_READ_TIMEOUT_S = 30.0
"""Timeout of connecting and of each read."""
_POLL_S = 0.1
_USER_AGENT = b"vz_ray"
_MAX_URL_LENGTH = 4096
"""Characters. Signed URLs of object stores have up to about 2,000."""
_MAX_LOGGED_LENGTH = 200
_ALLOWED_CHARACTERS = re.compile(r"[!-\[\]-~]+")
"""Printable ASCII without spaces and backslash, which some parsers treat as a slash."""


@dataclass(frozen=True, slots=True)
class DownloadRules:
    """Allowed URLs and limits.

    Attributes:
        schemes: Allowed schemes, such as `https` or `s3`.
        hosts: Allowed hosts or buckets; empty allows all.
        private_hosts: Hosts that may have private addresses.
    """

    schemes: tuple[str, ...] = ("http", "https")
    hosts: tuple[str, ...] = ()
    private_hosts: tuple[str, ...] = ()
    max_file_bytes: int = 8 * 2**30
    timeout_s: float = 600.0


class DownloadCache:
    """LRU cache of downloaded files.

    An open file stays readable after its eviction. The cache never revalidates a URL.

    Args:
        root: Directory; created if missing.
        max_bytes: Maximum size. The latest file is kept even if it exceeds the maximum.
    """

    def __init__(self, root: Path | str, max_bytes: int, rules: DownloadRules) -> None:
        self._root, self._max_bytes, self._rules = Path(root), max_bytes, rules

    def fetch(self, url: str) -> Path:
        """Return the local file of `url`; download it on a cache miss.

        Raises:
            SourceNotAllowedError: The rules reject the URL, a redirect or an address.
            VideoLimitExceededError: The file is too large.
            DownloadFailedError: The download failed or timed out.
        """
        check_url(url, self._rules)
        path = self._root / (blake3.blake3(url.encode()).hexdigest() + Path(urlsplit(url).path).suffix[:8])
        deadline_s = time.monotonic() + self._rules.timeout_s
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._lock(path, url, deadline_s):
                if not path.exists():
                    self._download(url, path, deadline_s)
                    self._evict(path)
                os.utime(path)
        except OSError as error:
            raise DownloadFailedError(f"{url}: cannot write to {self._root}: {error.strerror or error}") from error
        return path

    def _download(self, url: str, path: Path, deadline_s: float) -> None:
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with open(part, "wb") as file:
                size = 0
                for chunk in self._read(url, deadline_s):
                    size += len(chunk)
                    self._check_size(url, size)
                    if time.monotonic() > deadline_s:
                        raise DownloadFailedError(
                            f"{url}: received {size / 1e6:.0f} MB before the timeout of "
                            f"{self._rules.timeout_s:g} s; raise timeouts.download_s",
                            "the video took too long to fetch",
                        )
                    file.write(chunk)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def _check_size(self, url: str, size: int) -> None:
        if size > self._rules.max_file_bytes:
            raise VideoLimitExceededError(
                f"{url}: the file exceeds {self._rules.max_file_bytes / 2**30:g} GiB; raise clips.max_download_gib",
                "the video file is too large",
            )

    def _read(self, url: str, deadline_s: float) -> Iterator[bytes]:
        if urlsplit(url).scheme in HTTP_SCHEMES:
            return self._read_http(url, deadline_s)
        return self._read_object(url)

    def _read_http(self, url: str, deadline_s: float) -> Iterator[bytes]:
        backend = PublicNetworkBackend(self._rules.private_hosts)
        with httpcore.ConnectionPool(network_backend=backend) as pool:
            for _ in range(_MAX_REDIRECTS + 1):
                timeout_s = min(_READ_TIMEOUT_S, max(0.1, deadline_s - time.monotonic()))
                extensions = {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), timeout_s)}
                headers = [(b"user-agent", _USER_AGENT), (b"accept-encoding", b"identity")]
                try:
                    with pool.stream("GET", url, headers=headers, extensions=extensions) as response:
                        if response.status not in _REDIRECTS:
                            yield from self._read_body(url, response)
                            return
                        location = _header(response, b"location")
                except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError) as error:
                    raise DownloadFailedError(f"{url}: {type(error).__name__}: {error or 'timeout'}") from error
                url = self._redirect_target(url, location)
        raise DownloadFailedError(f"{url}: more than {_MAX_REDIRECTS} redirects")

    def _redirect_target(self, url: str, location: str | None) -> str:
        if not location:
            raise DownloadFailedError(f"{url}: redirect without a location")
        target = urljoin(url, location)
        if urlsplit(url).scheme == "https" and urlsplit(target).scheme == "http":
            raise SourceNotAllowedError(f"{url}: redirect from https to {target}")
        if urlsplit(target).scheme not in HTTP_SCHEMES:
            raise SourceNotAllowedError(f"{url}: redirect to {target}")
        check_url(target, self._rules)
        return target

    def _read_body(self, url: str, response: httpcore.Response) -> Iterator[bytes]:
        if response.status != 200:
            raise DownloadFailedError(f"{url}: HTTP status {response.status}")
        content_length = _header(response, b"content-length")
        if content_length is not None and content_length.isdigit():
            self._check_size(url, int(content_length))
        received = 0
        for chunk in response.iter_stream():
            received += len(chunk)
            yield chunk
        if content_length is not None and content_length.isdigit() and received != int(content_length):
            raise DownloadFailedError(
                f"{url}: received {received} of {content_length} bytes",
                "the video could not be fetched completely",
            )

    def _read_object(self, url: str) -> Iterator[bytes]:
        import fsspec

        try:
            with fsspec.open(url, "rb") as file:
                stream: Any = file
                while chunk := stream.read(_CHUNK_BYTES):
                    yield chunk
        except ImportError as error:
            raise SourceNotAllowedError(f"{url}: {error}; install the package to read this scheme") from error
        except FileNotFoundError as error:
            raise DownloadFailedError(f"{url}: no such object", "the video is missing") from error
        except Exception as error:  # object stores raise their own exception types
            raise DownloadFailedError(f"{url}: {type(error).__name__}: {error}") from error

    @contextlib.contextmanager
    def _lock(self, path: Path, url: str, deadline_s: float) -> Iterator[None]:
        """Lock the file across processes: one downloads, the others wait."""
        with open(path.with_name(f"{path.name}.lock"), "wb") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline_s:
                        raise DownloadFailedError(
                            f"{url}: another process did not finish the download within {self._rules.timeout_s:g} s",
                            "the video took too long to fetch",
                        ) from None
                    time.sleep(_POLL_S)
            yield

    def _evict(self, keep: Path) -> None:
        """Delete the least recently used files. The empty lock files stay."""
        files = [p for p in self._root.iterdir() if p.suffix not in (".lock", ".part") and p != keep]
        by_age = sorted((p.stat().st_mtime, p.stat().st_size, p) for p in files)
        total_bytes = keep.stat().st_size + sum(size for _, size, _ in by_age)
        for _, size, path in by_age:
            if total_bytes <= self._max_bytes:
                return
            path.unlink(missing_ok=True)
            total_bytes -= size


def check_url(url: str, rules: DownloadRules) -> None:
    """Check a URL against the rules, without network access.

    Raises:
        SourceNotAllowedError: The rules reject the URL, or parsers could interpret it differently.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        raise SourceNotAllowedError(f"{url[:_MAX_LOGGED_LENGTH]}: invalid URL ({error})") from error
    if parts.username is not None or parts.password is not None:
        raise SourceNotAllowedError(f"{host}: the URL contains a user name or password; remove them")
    if len(url) > _MAX_URL_LENGTH:
        raise SourceNotAllowedError(
            f"{url[:_MAX_LOGGED_LENGTH]}: the URL has {len(url)} characters; the maximum is {_MAX_URL_LENGTH}"
        )
    if not _ALLOWED_CHARACTERS.fullmatch(url):
        raise SourceNotAllowedError(
            f"{url!r}: the URL contains characters that need percent-encoding, or a host that is not ASCII"
        )
    if parts.scheme not in rules.schemes:
        raise SourceNotAllowedError(
            f"{url}: scheme {parts.scheme} is not allowed; it must be one of {', '.join(rules.schemes)} "
            "(clips.allowed_schemes)"
        )
    if not host:
        raise SourceNotAllowedError(f"{url}: the URL has no host")
    if rules.hosts and host not in rules.hosts:
        raise SourceNotAllowedError(
            f"{url}: host {host} is not allowed; it must be one of {', '.join(rules.hosts)} (clips.allowed_hosts)"
        )
    literal = parts.scheme in HTTP_SCHEMES and is_ip_literal(host)
    if literal and host not in rules.private_hosts and not is_public_literal(host):
        raise SourceNotAllowedError(
            f"{url}: host {host} is not a public IP address in standard notation; to allow it, add it to "
            "clips.allowed_private_hosts"
        )


def _header(response: httpcore.Response, name: bytes) -> str | None:
    for key, value in response.headers:
        if key.lower() == name:
            return bytes(value).decode("latin-1")
    return None
