"""The Files API: uploads, owners, expiry, quota, cleanup."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import time
from pathlib import Path

import httpx
import openai
import pytest

from tests.serve.conftest import GuardedServer, client_of_bob, error_of
from tests.video.sample_videos import VideoSpec, write_video
from tests.video.sample_videos import random_image as picture
from vz_ray.config.serve import AccessConfig, UploadsConfig
from vz_ray.serve.file_store import FileStore
from vz_ray.serve.files_api import open_store
from vz_ray.utils.errors import UserError
from vz_ray.video.image_encoding import encode_image

PNG = encode_image(picture(56, 28))


def send(client: httpx.Client, content: bytes, name: str = "a.mp4", **fields: str) -> httpx.Response:
    return client.post("/v1/files", files={"file": (name, content)}, data=fields)


def test_upload_with_the_openai_client(serve, video):
    served = serve()
    client = openai.OpenAI(api_key=served.secret, base_url=f"{served.url}/v1", max_retries=0)
    uploaded = client.files.create(file=video, purpose="user_data")
    assert uploaded.id.startswith("file-")
    assert (uploaded.object, uploaded.filename, uploaded.purpose) == ("file", "video.mp4", "user_data")
    assert uploaded.bytes == video.stat().st_size
    assert uploaded.model_dump()["duration_s"] == pytest.approx(12.8)
    assert [file.id for file in client.files.list()] == [uploaded.id]
    assert client.files.retrieve(uploaded.id) == uploaded
    assert client.files.content(uploaded.id).content == video.read_bytes()
    assert served.stored_files() == [f"{uploaded.id}.json", f"{uploaded.id}.mp4"]
    assert client.files.delete(uploaded.id).deleted
    assert served.stored_files() == []


def test_image_type_is_detected_from_content(serve):
    served = serve()
    with served.client() as client:
        uploaded = send(client, PNG, "movie.mp4").json()
        assert uploaded["content_type"] == "image/png"
        assert uploaded["duration_s"] is None
    assert f"{uploaded['id']}.png" in served.stored_files()


def test_list_supports_paging_and_order(serve):
    with serve().client() as client:
        uploaded = [
            send(client, PNG, f"{n}.png", purpose=p).json()["id"] for n, p in enumerate(["vision", "user_data"] * 2)
        ]
        page = client.get("/v1/files", params={"limit": 3}).json()
        assert [file["id"] for file in page["data"]] == uploaded[:0:-1]
        assert (page["has_more"], page["first_id"], page["last_id"]) == (True, uploaded[3], uploaded[1])
        page = client.get("/v1/files", params={"after": page["last_id"]}).json()
        assert ([file["id"] for file in page["data"]], page["has_more"]) == ([uploaded[0]], False)
        page = client.get("/v1/files", params={"order": "asc", "purpose": "vision"}).json()
        assert [file["id"] for file in page["data"]] == [uploaded[0], uploaded[2]]
        for wrong in ({"limit": 0}, {"limit": "a"}, {"order": "up"}, {"after": "file-x"}):
            error_of(client.get("/v1/files", params=wrong), 400)


def test_files_of_other_keys_are_missing(serve):
    served = serve()
    with served.client() as alice, client_of_bob(served) as other:
        id = send(alice, PNG).json()["id"]
        assert other.get("/v1/files").json()["data"] == []
        responses = [
            other.get(f"/v1/files/{id}"),
            other.get(f"/v1/files/{id}/content"),
            other.delete(f"/v1/files/{id}"),
            other.get(f"/v1/files/file-{'0' * 32}"),
        ]
        assert len({error_of(response, 404)["message"] for response in responses}) == 1
        assert alice.get(f"/v1/files/{id}").status_code == 200


@pytest.mark.parametrize("id", ["..", "%2e%2e%2fkeys", "file-..", "file-" + "g" * 32, "file-*", "a" * 500, "%00"])
def test_file_id_is_never_a_path(serve, id):
    served = serve()
    with served.client() as client:
        for path in (f"/v1/files/{id}", f"/v1/files/{id}/content"):
            assert client.get(path).status_code == 404
        assert client.delete(f"/v1/files/{id}").status_code in (404, 405)


def test_range_requests_and_safe_filename(serve, video):
    content = video.read_bytes()
    with serve().client() as client:
        id = send(client, content, 'a"; x=\r\ny.mp4/../ü<b>.mp4').json()["id"]
        url = f"/v1/files/{id}/content"
        part = client.get(url, headers={"range": "bytes=10-19"})
        assert (part.status_code, part.content) == (206, content[10:20])
        assert part.headers["content-range"] == f"bytes 10-19/{len(content)}"
        assert client.get(url, headers={"range": "bytes=-5"}).content == content[-5:]
        whole = client.get(url)
        assert whole.headers["content-type"] == "video/mp4"
        assert whole.headers["x-content-type-options"] == "nosniff"
        assert whole.headers["content-disposition"].startswith("attachment; filename")
        assert not set(whole.headers["content-disposition"]) & set("<>\r\n/")
        beyond = client.get(url, headers={"range": "bytes=999999999-"})
        error_of(beyond, 416)
        assert beyond.headers["content-range"].endswith(str(len(content)))
        error_of(client.get(url, headers={"range": "bytes=x-y"}), 400)


def heavy(folder: Path) -> bytes:
    """Return a video with an unsupported codec."""
    return write_video(folder, VideoSpec("v.mkv", codec="ffv1", frames=3, b_frames=0)).read_bytes()


HOSTILE = {
    "ffconcat": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "m3u8": b"#EXTM3U\n#EXTINF:1,\nhttp://169.254.169.254/latest\n",
    "mpd": b'<?xml version="1.0"?><MPD><BaseURL>file:///etc/passwd</BaseURL></MPD>',
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "html": b"<html><script>alert(1)</script></html>",
    "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
    "elf": b"\x7fELF" + bytes(600),
    "gif": b"GIF89a" + bytes(600),
    "wav": b"RIFF\0\0\0\0WAVEfmt " + bytes(600),
    "heic": b"\0\0\0\x20ftypheic" + bytes(600),
    "empty": b"",
    "invalid mp4": b"\0\0\0\x20ftypisom" + bytes(600),
    "playlist behind a box": b"\0\0\0\x08free#EXTM3U\nhttp://127.0.0.1/\n",
    "invalid png": b"\x89PNG\r\n\x1a\n" + bytes(600),
    "half a png": encode_image(picture(640, 360))[:3000],
    "half a jpeg": encode_image(picture(640, 360), "jpeg")[:3000],
    "invalid avi": b"RIFF\0\0\0\0AVI LIST" + bytes(600),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_other_file_types_are_refused(serve, name):
    served = serve()
    with served.client() as client:
        for called in ("a.mp4", "a.png"):
            response = send(client, HOSTILE[name], called)
            error_of(response, 400)
            assert str(served.directory) not in response.text
            assert "passwd" not in response.text
    assert served.stored_files() == []


def test_unsupported_codec_and_truncated_video_are_refused(serve, video, tmp_path):
    served = serve()
    with served.client() as client:
        assert error_of(send(client, heavy(tmp_path)), 400)["code"] == "unsupported_codec"
        error_of(send(client, video.read_bytes()[:2000]), 400)
    assert served.stored_files() == []


def test_invalid_form_fields_are_refused(serve):
    served = serve()
    two = [("file", ("a.png", PNG)), ("file", ("b.png", PNG))]
    with served.client() as client:
        post = client.post
        assert "more than one" in error_of(post("/v1/files", files=two), 400)["message"]
        assert error_of(post("/v1/files", files={"purpose": (None, "vision")}), 400)["code"] == "missing_parameter"
        assert error_of(send(client, PNG, colour="red"), 400)["code"] == "unknown_parameter"
        assert error_of(send(client, PNG, purpose="fine-tune"), 400)["param"] == "purpose"
        error_of(send(client, PNG, purpose="a" * 1000), 400)
        for seconds in ("1", "a", "-5", "9" * 50):
            error = error_of(send(client, PNG, **{"expires_after[seconds]": seconds}), 400)
            assert error["param"] == "expires_after[seconds]"
        error_of(send(client, PNG, **{"expires_after[anchor]": "now"}), 400)
        purpose = [("purpose", (None, "vision")), ("purpose", (None, "vision")), ("file", ("a.png", PNG))]
        assert "twice" in error_of(post("/v1/files", files=purpose), 400)["message"]
        as_file = {"file": ("a.png", PNG), "purpose": ("b", "vision")}
        assert "not a file" in error_of(post("/v1/files", files=as_file), 400)["message"]
        assert "no filename" in error_of(post("/v1/files", files={"file": (None, PNG)}), 400)["message"]
    assert served.stored_files() == []


def test_file_over_the_limit_is_refused(serve):
    served = serve(file_bytes=len(PNG) - 1)
    with served.client() as client:
        assert error_of(send(client, PNG), 413)["code"] == "file_too_large"
    assert served.stored_files() == []


def aged(served: GuardedServer, id: str, seconds: float) -> None:
    """Set the time of the last use of a file."""
    then = time.time() - seconds
    os.utime(served.directory / f"{id}.json", (then, then))


def test_quota_evicts_own_idle_files_only(serve):
    served = serve(max_gib=3.5 * len(PNG) / 2**30)
    with served.client() as alice, client_of_bob(served) as other:
        theirs = send(other, PNG).json()["id"]
        old, newer = (send(alice, PNG).json()["id"] for _ in range(2))
        assert error_of(send(alice, PNG), 507)["code"] == "storage_full"  # all files are in use
        aged(served, theirs, 9000)
        aged(served, old, 8000)
        aged(served, newer, 7000)
        last = send(alice, PNG).json()["id"]
        assert {name[:37] for name in served.stored_files()} == {theirs, newer, last}


def test_unused_file_expires(serve):
    served = serve(ttl_days=1)
    with served.client() as client:
        idle, used = (send(client, PNG).json()["id"] for _ in range(2))
        aged(served, idle, 80_000)
        aged(served, used, 80_000)
        client.get(f"/v1/files/{used}")
        aged(served, idle, 90_000)
        error_of(client.get(f"/v1/files/{idle}"), 404)
        assert [file["id"] for file in client.get("/v1/files").json()["data"]] == [used]
    FileStore(served.directory, 2**30, 1, 2**30)
    assert served.stored_files() == [f"{used}.json", f"{used}.png"]


def test_expires_after_is_respected(serve):
    served = serve()
    with served.client() as client:
        uploaded = send(client, PNG, **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}).json()
        assert uploaded["expires_at"] - uploaded["created_at"] == 3600
        facts = served.directory / f"{uploaded['id']}.json"
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"expires_at": 1.0}))
        error_of(client.get(f"/v1/files/{uploaded['id']}"), 404)


async def test_orphans_are_deleted_at_the_next_start(tmp_path):
    directory = tmp_path / "uploads"
    store = FileStore(directory, 2**30, 1, 2**30)
    (directory / f"file-{'1' * 32}.mp4").write_bytes(b"half")
    (directory / f"file-{'1' * 32}.part").write_bytes(b"{")
    (directory / f"file-{'2' * 32}.part").write_bytes(b"{")
    (directory / "notes.txt").write_text("someone else's")
    async with store.incoming("alice") as incoming:
        incoming.write(PNG)
        incoming.finish()
        other = multiprocessing.get_context("spawn").Process(target=FileStore, args=(directory, 2**30, 1, 2**30))
        other.start()
        other.join()
        assert other.exitcode == 0
        assert incoming.path.read_bytes() == PNG  # the file is still being written
        stored = store.add(incoming, "a.png", "vision")
    names = sorted(path.name for path in directory.iterdir())
    assert names == [f"{stored.id}.json", f"{stored.id}.png", "notes.txt"]
    FileStore(directory, 2**30, 1, 2**30)
    assert store.get(stored.id, "alice") == stored


async def test_sweep_deletes_expired_files(tmp_path):
    store = FileStore(tmp_path, 2**30, 1, 2**30)
    sweeping = asyncio.create_task(store.sweep_periodically(interval_s=0.01))
    async with store.incoming("alice") as incoming:
        incoming.write(PNG)
        incoming.finish()
        store.add(incoming, "a.png", "vision", expires_s=0)
    for _ in range(1000):
        await asyncio.sleep(0.01)
        if not any(tmp_path.iterdir()):
            break
    assert not any(tmp_path.iterdir())
    sweeping.cancel()


async def test_damaged_metadata_deletes_the_file(tmp_path):
    store = FileStore(tmp_path, 2**30, 1, 2**30)
    async with store.incoming("alice") as incoming:
        incoming.write(PNG)
        incoming.finish()
        stored = store.add(incoming, "a.png", "vision")
    (tmp_path / f"{stored.id}.json").write_text("{")
    assert store.get(stored.id, "alice") is None
    FileStore(tmp_path, 2**30, 1, 2**30)
    assert list(tmp_path.iterdir()) == []


def test_store_directory_is_private(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = open_store(UploadsConfig(), AccessConfig())
    assert store.directory == tmp_path / "vz_ray" / "uploads"
    assert store.directory.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"files\.directory"):
        open_store(UploadsConfig(directory=str(tmp_path / "file")), AccessConfig())
