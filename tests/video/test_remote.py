"""Downloads from a local HTTP server: caching, limits, redirects, SSRF protection."""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import httpcore
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.video.sample_videos import VideoSpec, write_video
from vz_ray.video.clip_reader import ClipReader
from vz_ray.video.errors import (
    DownloadFailedError,
    NotAVideoError,
    SourceNotAllowedError,
    VideoError,
    VideoLimitExceededError,
)
from vz_ray.video.frame import FrameSize, ZoomRequest
from vz_ray.video.public_network import (
    PublicNetworkBackend,
    is_ip_literal,
    is_public,
    resolve_public_addresses,
)
from vz_ray.video.remote import DownloadCache, DownloadRules
from vz_ray.video.video_file import VideoLocator

RULES = DownloadRules(private_hosts=("127.0.0.1",), timeout_s=20)
ZOOM, SIZE = ZoomRequest(1, 3, fps=4), FrameSize(min_pixels=784, max_pixels=56 * 56, factor=28)


class Handler(BaseHTTPRequestHandler):
    """Serves `responses` by path: status, headers, and chunks of the body with pauses (floats, seconds)."""

    responses: ClassVar[dict[str, tuple[int, dict[str, str], list[bytes | float]]]] = {}
    requests: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.requests.append(self.path)
        status, headers, body = self.responses[self.path]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        for chunk in body:
            if isinstance(chunk, float):
                time.sleep(chunk)
            else:
                try:
                    self.wfile.write(chunk)
                except OSError:  # the client closed the connection
                    return

    def log_message(self, *_: Any) -> None:
        """Disable logging."""


@pytest.fixture
def server() -> Iterator[str]:
    Handler.responses.clear()
    Handler.requests.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{http_server.server_address[1]}"
        http_server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video"), VideoSpec("video.mp4"))


def ok_response(content: bytes) -> tuple[int, dict[str, str], list[bytes | float]]:
    return 200, {"Content-Length": str(len(content))}, [content]


def download_cache(root: Path, rules: DownloadRules = RULES, max_bytes: int = 2**30) -> DownloadCache:
    return DownloadCache(root, max_bytes, rules)


def test_url_is_downloaded_once_and_read_like_a_file(server: str, video: Path, tmp_path: Path) -> None:
    Handler.responses["/v.mp4?x=1"] = ok_response(video.read_bytes())
    url = f"{server}/v.mp4?x=1"
    first = ClipReader(locator=VideoLocator(download_cache(tmp_path))).clip(url, ZOOM, SIZE)
    repeated = ClipReader(locator=VideoLocator(download_cache(tmp_path))).clip(url, ZOOM, SIZE)
    local = ClipReader().clip(str(video), ZOOM, SIZE)
    assert [f.ref.digest for f in first.frames] == [f.ref.digest for f in local.frames]
    assert first.refs == repeated.refs
    assert {ref.uri for ref in first.refs} == {url}
    assert Handler.requests == ["/v.mp4?x=1"]


def test_redirects_are_followed_and_checked(server: str, video: Path, tmp_path: Path) -> None:
    port = server.rpartition(":")[2]
    Handler.responses.update(
        {
            "/v": ok_response(video.read_bytes()),
            "/relative": (302, {"Location": "v"}, []),
            "/private": (302, {"Location": f"http://localhost:{port}/v"}, []),
            "/file": (302, {"Location": "file:///etc/passwd"}, []),
            "/metadata": (302, {"Location": "http://169.254.169.254/latest/meta-data"}, []),
            "/decimal": (302, {"Location": f"http://2130706434:{port}/v"}, []),
            "/userinfo": (302, {"Location": "http://user:secret@example.org/v"}, []),
            "/ftp": (302, {"Location": "ftp://example.org/v"}, []),
            "/nowhere": (302, {}, []),
            "/round": (302, {"Location": "/round"}, []),
        }
    )
    assert download_cache(tmp_path).fetch(f"{server}/relative").read_bytes() == video.read_bytes()
    for path, message in {
        "/private": "localhost resolves to .* not public.*clips.allowed_private_hosts",
        "/file": "redirect to file",
        "/metadata": "169.254.169.254 is not a public IP address",
        "/decimal": "2130706434 is not a public IP address",
        "/userinfo": "^example.org: the URL contains a user name",
        "/ftp": "redirect to ftp",
    }.items():
        with pytest.raises(SourceNotAllowedError, match=message):
            download_cache(tmp_path).fetch(server + path)
    for path, message in {
        "/nowhere": "redirect without a location",
        "/round": "more than 5 redirects",
    }.items():
        with pytest.raises(DownloadFailedError, match=message):
            download_cache(tmp_path).fetch(server + path)
    with pytest.raises(SourceNotAllowedError, match="from https to http://"):
        download_cache(tmp_path)._redirect_target("https://example.org/v", "http://example.org/v")


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "2130706433",
        "0x7f.1",
        "0.0.0.0",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:10.1.2.3]",
        "169.254.169.254",
        "10.0.0.1",
        "192.168.1.1",
        "172.16.0.1",
        "100.64.0.1",
        "[fd00::1]",
        "[fe80::1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "224.0.0.1",
        "017700000001",
        "0177.0.0.1",
        "0xA9FEA9FE",
        "127.0.0.1.",
        "①②⑦.0.0.1",
        "168.63.129.16",
        "192.0.0.192",
        "[::]",
        "[::127.0.0.1]",
        "[64:ff9b::a9fe:a9fe]",
        "[64:ff9b:1::1]",
        "[fec0::1]",
        "[fd00:ec2::254]",
        "[ff02::1]",
        "[2001:0:a:b::80ff:fffe]",
    ],
)
def test_private_address_is_rejected_before_connecting(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(httpcore.SyncBackend, "connect_tcp", lambda *_, **__: pytest.fail("connected"))
    with pytest.raises(SourceNotAllowedError, match=r"not public|not a public|not ASCII"):
        download_cache(tmp_path, DownloadRules()).fetch(f"http://{host}:8080/v.mp4")


@pytest.mark.parametrize("host", ["2130706433", "0x7f.1", "0177.1", "[::ffff:127.0.0.1]", "LOCALHOST", "①②⑦.0.0.1"])
def test_backend_checks_the_resolved_address(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpcore.SyncBackend, "connect_tcp", lambda *_, **__: pytest.fail("connected"))
    with pytest.raises(SourceNotAllowedError, match="not public"):
        PublicNetworkBackend(("127.0.0.1",)).connect_tcp(host.strip("[]"), 80)


@pytest.mark.parametrize(
    ("host", "is_address"),
    [
        ("127.0.0.1", True),
        ("1", True),
        ("0x7F.1", True),
        ("a.0x", True),
        ("1.2.3.4.", True),
        ("::1", True),
        ("example.org", False),
        ("1.example", False),
        ("v1", False),
        ("0xample.org", False),
        ("", False),
    ],
)
def test_ip_literals_are_detected_as_in_browsers(host: str, is_address: bool) -> None:
    assert is_ip_literal(host) == is_address


@given(st.ip_addresses())
def test_embedded_ipv4_address_decides_publicness(address: Any) -> None:
    if is_public(address):
        assert address.is_global
    if address.version == 4:
        embedded = [ipaddress.IPv6Address(prefix + int(address)) for prefix in (0xFFFF << 32, 0x64FF9B << 96)]
        assert {is_public(ipv6) for ipv6 in embedded} == {is_public(address)}


def test_internet_addresses_are_public() -> None:
    for address in ("93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "64:ff9b::5db8:d70e"):
        assert is_public(ipaddress.ip_address(address))


def test_connection_uses_the_checked_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: a second resolution would return a private address."""
    resolutions = iter(["93.184.215.14", "127.0.0.1"])

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(resolutions), port))]

    connected: list[str] = []

    def connect(self: object, host: str, port: int, *_: Any, **__: Any) -> None:
        connected.append(host)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(httpcore.SyncBackend, "connect_tcp", connect)
    PublicNetworkBackend().connect_tcp("rebinding.example", 80)
    assert connected == ["93.184.215.14"]
    with pytest.raises(SourceNotAllowedError):
        resolve_public_addresses("rebinding.example", 80)


def test_host_with_one_private_address_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [(2, 1, 6, "", (address, 80)) for address in ("93.184.215.14", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    with pytest.raises(SourceNotAllowedError, match=r"10\.0\.0\.1"):
        resolve_public_addresses("two.example", 80)


@pytest.mark.parametrize(
    ("rules", "url", "message"),
    [
        ({}, "ftp://example.org/v.mp4", "scheme ftp is not allowed; it must be one of http, https"),
        ({}, "s3://bucket/v.mp4", "scheme s3"),
        ({}, "http://user:secret@example.org/v.mp4", "^example.org: the URL contains a user name"),
        (
            {"hosts": ("example.org",)},
            "http://example.com/v.mp4",
            "example.com is not allowed; it must be one of example.org",
        ),
        ({}, "http://@example.org/v.mp4", "contains a user name"),
        ({"hosts": ("example.org",)}, "http://example.org./v.mp4", "example.org. is not allowed"),
        ({}, "http://[::1/v.mp4", "invalid URL"),
        ({}, "http://example.org:99999/v.mp4", "invalid URL"),
        ({}, "http:///v.mp4", "the URL has no host"),
        ({}, "http://exämple.org/v.mp4", "not ASCII"),
        ({}, "http://example.org/a b", "percent-encoding"),
        ({}, "http://example.org\\@127.0.0.1/v", "percent-encoding|user name"),
        ({}, "http://example.org/" + "a" * 5000, "the maximum is 4096"),
        ({"schemes": ("nostore",)}, "nostore://bucket/v.mp4", "nostore"),
    ],
)
def test_url_against_the_rules_is_rejected(rules: dict[str, Any], url: str, message: str, tmp_path: Path) -> None:
    with pytest.raises((SourceNotAllowedError, DownloadFailedError), match=message) as raised:
        download_cache(tmp_path, DownloadRules(**rules)).fetch(url)
    assert "secret" not in str(raised.value)


def test_failed_downloads_leave_no_files(server: str, tmp_path: Path) -> None:
    kilobyte = bytes(1000)
    Handler.responses.update(
        {
            "/declared": (200, {"Content-Length": "5000"}, [bytes(5000)]),
            "/undeclared": (200, {}, [kilobyte] * 5),
            "/slow": (
                200,
                {"Content-Length": "100"},
                [b"x", 0.3, b"x", 0.3, b"x", 0.3, b"x", 0.3, b"x", 0.3],
            ),
            "/truncated": (200, {"Content-Length": "5000"}, [kilobyte]),
            "/missing": (404, {}, []),
        }
    )
    small, quick = replace(RULES, max_file_bytes=4000), replace(RULES, timeout_s=0.5)
    expected: dict[str, tuple[DownloadRules, type[VideoError], str]] = {
        "/declared": (small, VideoLimitExceededError, "clips.max_download_gib"),
        "/undeclared": (small, VideoLimitExceededError, "clips.max_download_gib"),
        "/slow": (quick, DownloadFailedError, "timeouts.download_s|timeout|ReadTimeout"),
        "/truncated": (RULES, DownloadFailedError, "received|closed|incomplete"),
        "/missing": (RULES, DownloadFailedError, "status 404"),
    }
    for path, (rules, error, message) in expected.items():
        with pytest.raises(error, match=message) as raised:
            download_cache(tmp_path, rules).fetch(server + path)
        assert server not in raised.value.model_message
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".lock"]


def test_unreachable_server_is_named(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v.mp4"
        with pytest.raises(DownloadFailedError, match=r"/v\.mp4: ConnectError"):
            download_cache(tmp_path).fetch(url)
    with pytest.raises(DownloadFailedError, match="cannot be resolved"):
        download_cache(tmp_path).fetch("http://no-such-host.invalid/v.mp4")


def test_downloaded_file_is_validated(server: str, tmp_path: Path) -> None:
    Handler.responses["/v.mp4"] = ok_response(b"ffconcat version 1.0\nfile /etc/passwd\n")
    with pytest.raises(NotAVideoError, match=r"/v\.mp4"):
        ClipReader(locator=VideoLocator(download_cache(tmp_path))).probe(f"{server}/v.mp4")


def test_concurrent_downloads_of_a_url_are_shared(server: str, video: Path, tmp_path: Path) -> None:
    content = video.read_bytes()
    Handler.responses["/v.mp4"] = (200, {}, [content[:1000], 0.3, content[1000:]])
    contents: list[bytes] = []

    def download() -> None:
        contents.append(download_cache(tmp_path).fetch(f"{server}/v.mp4").read_bytes())

    threads = [threading.Thread(target=download) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents == [content] * 4
    assert Handler.requests == ["/v.mp4"]


def test_least_recently_used_downloads_are_evicted(server: str, tmp_path: Path) -> None:
    for name in ("/a", "/b", "/c"):
        Handler.responses[name] = ok_response(bytes(1000))
    cache = download_cache(tmp_path, max_bytes=2500)
    a, b = cache.fetch(f"{server}/a"), cache.fetch(f"{server}/b")
    os.utime(a, (1, 1))
    os.utime(b, (2, 2))
    cache.fetch(f"{server}/a")
    c = cache.fetch(f"{server}/c")
    assert (a.exists(), b.exists(), c.exists()) == (True, False, True)


def test_object_store_is_read_if_its_scheme_is_allowed(video: Path, tmp_path: Path) -> None:
    with fsspec.open("memory://bucket/v.mp4", "wb") as file:
        file.write(video.read_bytes())
    store = download_cache(tmp_path, DownloadRules(schemes=("memory",)))
    clip = ClipReader(locator=VideoLocator(store)).clip("memory://bucket/v.mp4", ZOOM, SIZE)
    assert len(clip.frames) == 8
    with pytest.raises(DownloadFailedError, match="no such object"):
        store.fetch("memory://bucket/other.mp4")


def test_file_outside_allowed_dirs_is_rejected_even_by_link(video: Path, tmp_path: Path) -> None:
    root = tmp_path / "videos"
    root.mkdir()
    (root / "link.mp4").symlink_to(video)
    (root / "own.mp4").write_bytes(video.read_bytes())
    reader = ClipReader(locator=VideoLocator(roots=[root]))
    assert reader.probe(str(root / "own.mp4")).duration_s > 0
    for path in (video, root / "link.mp4", root / ".." / video.name, tmp_path / "videos-other" / "v.mp4"):
        with pytest.raises(SourceNotAllowedError, match=r"clips\.allowed_dirs"):
            reader.probe(str(path))
