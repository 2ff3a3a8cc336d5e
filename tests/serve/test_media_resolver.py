"""Resolution of media: uploads, inline data, URLs and paths."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
from starlette.requests import ClientDisconnect

from tests.serve.conftest import client_of_bob, error_of
from tests.serve.test_files_api import PNG, send
from vz_ray.serve.api_errors import ApiError
from vz_ray.serve.file_store import FileStore
from vz_ray.serve.media_resolver import MediaResolver, MediaStreamingResponse
from vz_ray.video.remote import DownloadRules


def data(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "uploads", 2**30, 7, 2**20)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An allowed directory, a forbidden one, and links between them."""
    allowed, secret = tmp_path / "videos", tmp_path / "videos-secret"
    for folder in (allowed, secret):
        folder.mkdir()
        (folder / "a b.mp4").write_bytes(b"video")
    (allowed / "inside.mp4").symlink_to(allowed / "a b.mp4")
    (allowed / "out.mp4").symlink_to(secret / "a b.mp4")
    (allowed / "folder").symlink_to(secret)
    (allowed / "round.mp4").symlink_to(allowed / "round.mp4")
    return allowed


def test_upload_resolves_for_its_owner_only(serve, video):
    served = serve()
    with served.client() as alice, client_of_bob(served) as other:
        video_id, image = (send(alice, content).json()["id"] for content in (video.read_bytes(), PNG))
        assert alice.post("/v1/ask", json={"video": video_id, "image": image}).status_code == 200
        uri = str(served.directory / f"{video_id}.mp4")
        assert served.seen == [(uri, True), (uri.replace(f"{video_id}.mp4", f"{image}.png"), True)]
        assert error_of(other.post("/v1/ask", json={"video": video_id}), 404)["param"] == "content.0"
        error = error_of(alice.post("/v1/ask", json={"image": video_id}), 400)
        assert (error["code"], error["param"]) == ("wrong_medium", "content.1")


def test_inline_media_are_deleted_after_the_request(serve, video):
    served = serve()
    with served.client() as client:
        ask = {"video": data(video.read_bytes(), "video/mp4"), "image": data(PNG, "image/png")}
        assert client.post("/v1/ask", json=ask).status_code == 200
        assert [Path(uri).suffix for uri, exists in served.seen if exists] == [".mp4", ".png"]
        assert served.stored_files() == []
        error_of(client.post("/v1/ask", json={**ask, "image": "ftp://a"}), 400)  # the second part fails
        assert len(served.seen) == 3
        assert client.get("/v1/files").json()["data"] == []
    assert served.stored_files() == []


@pytest.mark.parametrize(
    ("kind", "url", "status", "code"),
    [
        ("video", "data:,abc", 400, None),
        ("video", "data:video/mp4,abc", 400, None),
        ("video", "data:text/html;base64,PGI+", 400, None),
        ("image", "data:image/svg+xml;base64,PHN2Zz4=", 400, None),
        ("image", "data:image/gif;base64,R0lGODlh", 400, None),
        ("image", data(PNG, "video/mp4"), 400, None),
        ("video", data(PNG, "video/mp4"), 400, "wrong_medium"),
        ("image", data(PNG, "image/png")[:-5] + "*====", 400, "invalid_base64"),
        ("image", "data:image/png;base64,iVBORw0KGgo", 400, "invalid_base64"),
        ("image", "data:image/png;base64,é" + "A" * 99, 400, "invalid_base64"),
        ("image", "data:image/png;base64,", 400, "empty_file"),
        ("video", data(b"#EXTM3U\nfile:///etc/passwd\n", "video/mp4"), 400, "unsupported_file"),
        ("video", data(b"ffconcat version 1.0\nfile /etc/passwd\n", "video/mp4"), 400, "unsupported_file"),
        ("video", data(b"\0\0\0\x20ftypisom" + bytes(2**21), "video/mp4"), 413, None),
        ("image", f"data:image/png;{'a=b;' * 1000}base64,AAAA", 400, None),
    ],
    ids=range(15),
)
async def test_inline_media_with_wrong_type_are_refused(store, kind, url, status, code):
    async with MediaResolver(store, "alice", DownloadRules()) as media:
        with pytest.raises(ApiError) as caught:
            await media.resolve(url, kind, "content.0")
        assert (caught.value.status, caught.value.param) == (status, "content.0")
        if code is not None:
            assert caught.value.code == code
        assert len(caught.value.message) < 300
    assert list(store.directory.iterdir()) == []


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/v.mp4",
        "http://2130706433/v.mp4",
        "http://0x7f.1/v.mp4",
        "http://017700000001/v.mp4",
        "http://0177.0.0.01/v.mp4",
        "http://127.1/v.mp4",
        "http://127.0.0.1./v.mp4",
        "http://0/v.mp4",
        "http://0.0.0.0/v.mp4",
        "http://[::1]/v.mp4",
        "http://[::]/v.mp4",
        "http://[::ffff:127.0.0.1]/v.mp4",
        "http://[::ffff:7f00:1]/v.mp4",
        "http://[64:ff9b::a9fe:a9fe]/v.mp4",
        "http://[fe80::1%25eth0]/v.mp4",
        "http://[fd00:ec2::254]/v.mp4",
        "http://[fec0::1]/v.mp4",
        "http://169.254.169.254/latest/meta-data",
        "http://168.63.129.16/machine",
        "http://192.168.0.1/v.mp4",
        "http://①②⑦.0.0.1/v.mp4",
        "http://ⓛocalhost/v.mp4",
        "http://exa mple.org/v.mp4",
        "http://example.org\\@127.0.0.1/v.mp4",
        "http://example.org\r\nX: y/v.mp4",
        "http://user@example.org/v.mp4",
        "http://:secret@example.org/v.mp4",
        "http://@example.org/v.mp4",
        "http://[::1/v.mp4",
        "http://example.org:99999/v.mp4",
        "http://example.org:a/v.mp4",
        "http:///v.mp4",
        "http:v.mp4",
        "http://example.org/" + "a" * 5000,
        "ftp://example.org/v.mp4",
        "s3://bucket/v.mp4",
        "gopher://example.org/",
        "javascript:alert(1)",
        "concat:/etc/passwd|/etc/hosts",
        "subfile,,start,0,end,9,,:/etc/passwd",
        "crypto:file:/etc/passwd",
        "pipe:0",
        "v.mp4",
        "../v.mp4",
        "~/v.mp4",
        "",
        " http://example.org/v.mp4",
        "//example.org/v.mp4",
        "\\\\example.org\\v.mp4",
        "/etc/passwd",
        "file:///etc/passwd",
        "file:/etc/passwd",
        "FILE:///etc/passwd",
        "file://example.org/etc/passwd",
    ],
)
async def test_private_urls_are_refused_without_details(store, url):
    for kind in ("video", "image"):
        async with MediaResolver(store, "alice", DownloadRules()) as media:
            with pytest.raises(ApiError) as caught:
                await media.resolve(url, kind)
        assert caught.value.status == 400
        assert caught.value.code == "source_not_allowed"
        assert caught.value.message == "The server cannot open this address."


@pytest.mark.parametrize("url", ["https://example.org/v.mp4?a=b", "http://93.184.215.14:81/v", "HTTPS://Example.org/v"])
async def test_public_urls_are_passed_to_the_decoders(store, url):
    async with MediaResolver(store, "alice", DownloadRules()) as media:
        source = await media.resolve(url, "image")
        assert (source.uri, source.modality) == (url, "image")


async def test_only_allowed_hosts_are_accepted(store):
    rules = DownloadRules(hosts=("example.org",))
    async with MediaResolver(store, "alice", rules) as media:
        assert (await media.resolve("https://example.org/v", "video")).uri
        for host in ("example.com", "example.org.", "www.example.org", "example.org.evil.example"):
            with pytest.raises(ApiError):
                await media.resolve(f"https://{host}/v", "video")


@pytest.mark.parametrize("form", ["{}", "file://{}", "file://localhost{}", "file:{}"])
async def test_files_in_allowed_dirs_resolve_to_real_paths(store, root, form):
    async with MediaResolver(store, "alice", DownloadRules(), [str(root)]) as media:
        for name in ("a b.mp4", "inside.mp4", "../videos/a b.mp4"):
            path = f"{root}/{name}".replace(" ", "%20" if form != "{}" else " ")
            assert (await media.resolve(form.format(path), "video")).uri == f"{root}/a b.mp4"


@pytest.mark.parametrize(
    "name",
    [
        "out.mp4",
        "folder/a b.mp4",
        "../videos-secret/a b.mp4",
        "../videos-secret",
        "",
        ".",
        "..",
        "a\0.mp4",
        "round.mp4",
    ],
)
async def test_links_and_dots_cannot_leave_allowed_dirs(store, root, name):
    async with MediaResolver(store, "alice", DownloadRules(), [str(root)]) as media:
        plain = f"{root}/{name}"
        for url in (plain, f"file://{plain}", f"file://{plain}".replace("..", "%2e%2e")):
            with pytest.raises(ApiError) as caught:
                await media.resolve(url, "video")
            assert str(root) not in caught.value.message
            assert caught.value.status in (400, 404)


async def test_outside_paths_get_the_same_error(store, root):
    messages = set()
    async with MediaResolver(store, "alice", DownloadRules(), [str(root)]) as media:
        for path in (root.parent / "videos-secret" / "a b.mp4", root.parent / "nothing", Path("/etc/passwd")):
            with pytest.raises(ApiError) as caught:
                await media.resolve(str(path), "video")
            messages.add((caught.value.status, caught.value.message))
    assert len(messages) == 1


@pytest.mark.parametrize("gone", [True, False])
async def test_stream_resources_close_even_if_not_started(store, gone):
    async with AsyncExitStack() as stack:
        media = await stack.enter_async_context(MediaResolver(store, "alice", DownloadRules()))
        source = await media.resolve(data(PNG, "image/png"), "image")
        resources = stack.pop_all()
    exists = []

    async def events() -> AsyncIterator[str]:
        exists.append(Path(source.uri).exists())
        yield "data: 1\n\n"

    async def send(_: object) -> None:
        if gone:
            raise OSError("the client is gone")

    async def receive() -> dict[str, str]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    with suppress(ClientDisconnect):
        await MediaStreamingResponse(events(), resources)(
            {"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send
        )
    assert exists == ([] if gone else [True])
    assert list(store.directory.iterdir()) == []


async def test_media_count_is_limited(store):
    async with MediaResolver(store, "alice", DownloadRules()) as media:
        for _ in range(64):
            await media.resolve("https://example.org/v", "video")
        with pytest.raises(ApiError, match="64 videos and images"):
            await media.resolve("https://example.org/v", "video")
