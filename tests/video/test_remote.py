"""Videos at URLs: a real server on this machine, hostile in every way it can be."""

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
    VideoLimitExceededError,
)
from vz_ray.video.frame import FrameSize, VideoError, ZoomRequest
from vz_ray.video.public_network import (
    PublicNetworkBackend,
    is_ip_literal,
    is_public,
    resolve_public_addresses,
)
from vz_ray.video.remote import DownloadCache, DownloadRules
from vz_ray.video.video_file import VideoLocator

RULES = DownloadRules(private_hosts=("127.0.0.1",), timeout_s=20)
LOOK, SIZE = ZoomRequest(1, 3, fps=4), FrameSize(min_pixels=784, max_pixels=56 * 56)


class Handler(BaseHTTPRequestHandler):
    """What a path answers is in `answers`: status, headers, and pieces of the body with pauses."""

    answers: ClassVar[dict[str, tuple[int, dict[str, str], list[bytes | float]]]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        status, headers, body = self.answers[self.path]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        for piece in body:
            if isinstance(piece, float):
                time.sleep(piece)
            else:
                try:
                    self.wfile.write(piece)
                except OSError:  # the other side has had enough
                    return

    def log_message(self, *_: Any) -> None:
        """Silent."""


@pytest.fixture
def server() -> Iterator[str]:
    Handler.answers.clear()
    Handler.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{serving.server_address[1]}"
        serving.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video"), VideoSpec("video.mp4"))


def whole(content: bytes) -> tuple[int, dict[str, str], list[bytes | float]]:
    return 200, {"Content-Length": str(len(content))}, [content]


def downloads(root: Path, rules: DownloadRules = RULES, most: int = 2**30) -> DownloadCache:
    return DownloadCache(root, most, rules)


def test_a_url_gives_the_frames_of_the_file_and_is_fetched_once(
    server: str, video: Path, tmp_path: Path
) -> None:
    Handler.answers["/v.mp4?x=1"] = whole(video.read_bytes())
    url = f"{server}/v.mp4?x=1"
    first = ClipReader(locator=VideoLocator(downloads(tmp_path))).zoom(url, LOOK, SIZE)
    again = ClipReader(locator=VideoLocator(downloads(tmp_path))).zoom(url, LOOK, SIZE)
    plain = ClipReader().zoom(str(video), LOOK, SIZE)
    assert [f.ref.digest for f in first.frames] == [f.ref.digest for f in plain.frames]
    assert first.refs == again.refs
    assert {ref.uri for ref in first.refs} == {url}  # any machine can fetch it by that
    assert Handler.asked == ["/v.mp4?x=1"]


def test_redirects_are_followed_and_vetted(server: str, video: Path, tmp_path: Path) -> None:
    port = server.rpartition(":")[2]
    Handler.answers.update(
        {
            "/v": whole(video.read_bytes()),
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
    assert downloads(tmp_path).fetch(f"{server}/relative").read_bytes() == video.read_bytes()
    for path, message in {
        "/private": "localhost has the address .* not public.*clips.allowed_private_hosts",
        "/file": "redirects to file",
        "/metadata": "169.254.169.254 is an address that is not public",
        "/decimal": "2130706434 is an address that is not public",
        "/userinfo": "^example.org: a URL with a user name",
        "/ftp": "redirects to ftp",
    }.items():
        with pytest.raises(SourceNotAllowedError, match=message):
            downloads(tmp_path).fetch(server + path)
    for path, message in {"/nowhere": "redirects to nowhere", "/round": "more than 5 redirects"}.items():
        with pytest.raises(DownloadFailedError, match=message):
            downloads(tmp_path).fetch(server + path)
    with pytest.raises(SourceNotAllowedError, match="from https to http://"):
        downloads(tmp_path)._onward("https://example.org/v", "http://example.org/v")


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
def test_an_address_that_is_not_public_is_refused_before_it_is_connected_to(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(httpcore.SyncBackend, "connect_tcp", lambda *_, **__: pytest.fail("connected"))
    with pytest.raises(SourceNotAllowedError, match=r"not public|not in ASCII"):
        downloads(tmp_path, DownloadRules()).fetch(f"http://{host}:8080/v.mp4")


@pytest.mark.parametrize(
    "host", ["2130706433", "0x7f.1", "0177.1", "[::ffff:127.0.0.1]", "LOCALHOST", "①②⑦.0.0.1"]
)
def test_whatever_is_connected_to_is_vetted_by_its_address_not_by_how_it_is_written(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_addresses_are_told_from_names_as_browsers_do(host: str, is_address: bool) -> None:
    assert is_ip_literal(host) == is_address


@given(st.ip_addresses())
def test_what_is_public_is_global_and_says_so_however_it_is_wrapped(address: Any) -> None:
    if is_public(address):
        assert address.is_global
    if address.version == 4:
        wrapped = [ipaddress.IPv6Address(prefix + int(address)) for prefix in (0xFFFF << 32, 0x64FF9B << 96)]
        assert {is_public(one) for one in wrapped} == {is_public(address)}


def test_addresses_of_the_internet_are_public() -> None:
    for address in ("93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "64:ff9b::5db8:d70e"):
        assert is_public(ipaddress.ip_address(address))


def test_the_address_connected_to_is_the_one_that_was_vetted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that answers differently the second time gets no second time."""
    answers = iter(["93.184.215.14", "127.0.0.1"])

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    connected: list[str] = []

    def connect(self: object, host: str, port: int, *_: Any, **__: Any) -> None:
        connected.append(host)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(httpcore.SyncBackend, "connect_tcp", connect)
    PublicNetworkBackend().connect_tcp("rebinding.example", 80)
    assert connected == ["93.184.215.14"]
    with pytest.raises(SourceNotAllowedError):
        resolve_public_addresses("rebinding.example", 80)


def test_a_name_with_one_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [(2, 1, 6, "", (address, 80)) for address in ("93.184.215.14", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    with pytest.raises(SourceNotAllowedError, match=r"10\.0\.0\.1"):
        resolve_public_addresses("two.example", 80)


@pytest.mark.parametrize(
    ("rules", "url", "message"),
    [
        ({}, "ftp://example.org/v.mp4", "the scheme ftp is not among http, https"),
        ({}, "s3://bucket/v.mp4", "the scheme s3"),
        ({}, "http://user:secret@example.org/v.mp4", "^example.org: a URL with a user name"),
        ({"hosts": ("example.org",)}, "http://example.com/v.mp4", "example.com is not among example.org"),
        ({}, "http://@example.org/v.mp4", "with a user name"),
        ({"hosts": ("example.org",)}, "http://example.org./v.mp4", "example.org. is not among"),
        ({}, "http://[::1/v.mp4", "not a URL"),
        ({}, "http://example.org:99999/v.mp4", "not a URL"),
        ({}, "http:///v.mp4", "without a host"),
        ({}, "http://exämple.org/v.mp4", "not in ASCII"),
        ({}, "http://example.org/a b", "percent-encoded"),
        ({}, "http://example.org\\@127.0.0.1/v", "percent-encoded|user name"),
        ({}, "http://example.org/" + "a" * 5000, "4096 are the most"),
        ({"schemes": ("nostore",)}, "nostore://bucket/v.mp4", "nostore"),
    ],
)
def test_what_the_rules_do_not_allow_is_refused(
    rules: dict[str, Any], url: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises((SourceNotAllowedError, DownloadFailedError), match=message) as caught:
        downloads(tmp_path, DownloadRules(**rules)).fetch(url)
    assert "secret" not in str(caught.value)


def test_too_large_too_slow_cut_off_and_missing_leave_nothing_behind(server: str, tmp_path: Path) -> None:
    kilobyte = bytes(1000)
    Handler.answers.update(
        {
            "/told": (200, {"Content-Length": "5000"}, [bytes(5000)]),
            "/untold": (200, {}, [kilobyte] * 5),
            "/slow": (
                200,
                {"Content-Length": "100"},
                [b"x", 0.3, b"x", 0.3, b"x", 0.3, b"x", 0.3, b"x", 0.3],
            ),
            "/cut": (200, {"Content-Length": "5000"}, [kilobyte]),
            "/gone": (404, {}, []),
        }
    )
    small, quick = replace(RULES, max_file_bytes=4000), replace(RULES, timeout_s=0.5)
    expected: dict[str, tuple[DownloadRules, type[VideoError], str]] = {
        "/told": (small, VideoLimitExceededError, "clips.max_download_gib"),
        "/untold": (small, VideoLimitExceededError, "clips.max_download_gib"),
        "/slow": (quick, DownloadFailedError, "timeouts.download_s|no answer in time|ReadTimeout"),
        "/cut": (RULES, DownloadFailedError, "bytes arrived|closed|incomplete"),
        "/gone": (RULES, DownloadFailedError, "status 404"),
    }
    for path, (rules, error, message) in expected.items():
        with pytest.raises(error, match=message) as caught:
            downloads(tmp_path, rules).fetch(server + path)
        assert server not in caught.value.model_message
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".lock"]


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v.mp4"
        with pytest.raises(DownloadFailedError, match=r"/v\.mp4: ConnectError"):
            downloads(tmp_path).fetch(url)
    with pytest.raises(DownloadFailedError, match="cannot be resolved"):
        downloads(tmp_path).fetch("http://no-such-host.invalid/v.mp4")


def test_what_is_fetched_is_checked_like_any_file(server: str, tmp_path: Path) -> None:
    Handler.answers["/v.mp4"] = whole(b"ffconcat version 1.0\nfile /etc/passwd\n")
    with pytest.raises(NotAVideoError, match=r"/v\.mp4"):
        ClipReader(locator=VideoLocator(downloads(tmp_path))).probe(f"{server}/v.mp4")


def test_askers_of_one_url_wait_for_the_first(server: str, video: Path, tmp_path: Path) -> None:
    content = video.read_bytes()
    Handler.answers["/v.mp4"] = (200, {}, [content[:1000], 0.3, content[1000:]])
    found: list[bytes] = []

    def ask() -> None:
        found.append(downloads(tmp_path).fetch(f"{server}/v.mp4").read_bytes())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [content] * 4
    assert Handler.asked == ["/v.mp4"]


def test_the_files_not_used_for_longest_are_dropped(server: str, tmp_path: Path) -> None:
    for name in ("/a", "/b", "/c"):
        Handler.answers[name] = whole(bytes(1000))
    kept = downloads(tmp_path, most=2500)
    a, b = kept.fetch(f"{server}/a"), kept.fetch(f"{server}/b")
    os.utime(a, (1, 1))
    os.utime(b, (2, 2))
    kept.fetch(f"{server}/a")
    c = kept.fetch(f"{server}/c")
    assert (a.exists(), b.exists(), c.exists()) == (True, False, True)


def test_object_stores_are_read_where_they_are_allowed(video: Path, tmp_path: Path) -> None:
    with fsspec.open("memory://bucket/v.mp4", "wb") as file:
        file.write(video.read_bytes())
    store = downloads(tmp_path, DownloadRules(schemes=("memory",)))
    clip = ClipReader(locator=VideoLocator(store)).zoom("memory://bucket/v.mp4", LOOK, SIZE)
    assert len(clip.frames) == 8
    with pytest.raises(DownloadFailedError, match="no such object"):
        store.fetch("memory://bucket/other.mp4")


def test_files_outside_the_roots_are_refused_also_through_a_link(video: Path, tmp_path: Path) -> None:
    root = tmp_path / "videos"
    root.mkdir()
    (root / "link.mp4").symlink_to(video)
    (root / "own.mp4").write_bytes(video.read_bytes())
    reader = ClipReader(locator=VideoLocator(roots=[root]))
    assert reader.probe(str(root / "own.mp4")).duration_s > 0
    for path in (video, root / "link.mp4", root / ".." / video.name, tmp_path / "videos-other" / "v.mp4"):
        with pytest.raises(SourceNotAllowedError, match=r"clips\.roots"):
            reader.probe(str(path))
