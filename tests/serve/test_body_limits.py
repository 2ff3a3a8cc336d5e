"""Request bodies that are too large, too slow, endless or incomplete."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.serve.conftest import GuardedServer, read_response
from vz_ray.serve.body_limits import BodyLimits, LimitedBody

JSON = "POST /v1/ask HTTP/1.1\nContent-Type: application/json\n"
UPLOAD = "POST /v1/files HTTP/1.1\nContent-Type: multipart/form-data; boundary=b\n"
PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n'
MP4 = b"\0\0\0\x20ftypisom" + bytes(1000)


def empty(served: GuardedServer) -> bool:
    """Wait until the directory of uploads is empty; return False at the timeout."""
    for _ in range(1000):
        if not served.stored_files():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("head", [JSON, UPLOAD])
def test_declared_100_gb_body_is_refused_unread(serve, head):
    served = serve()
    status, text = read_response(served.send_raw(f"{head}Content-Length: {100 * 2**30}"))
    assert status == 413
    assert '"code":"request_too_large"' in text
    assert "connection: close" in text
    assert served.stored_files() == []


def test_expect_continue_is_refused_before_sending(serve):
    connection = serve().send_raw(f"{UPLOAD}Content-Length: {100 * 2**30}\nExpect: 100-continue")
    status, text = read_response(connection)
    assert status == 413
    assert "100 Continue" not in text


@pytest.mark.parametrize("length", ["-1", "a", "1_0", "٣", "1, 2"])
def test_invalid_content_length_is_refused(serve, length):
    status, _ = read_response(serve().send_raw(f"{JSON}Connection: close\nContent-Length: {length}"))
    assert status == 400


@pytest.mark.parametrize(("head", "start"), [(JSON, b'{"video": "'), (UPLOAD, PART + MP4)])
def test_endless_body_is_cut_off_at_the_limit(serve, head, start):
    served = serve(max_json_mib=0.1, max_upload_gib=1e-4)
    connection = served.send_raw(f"{head}Transfer-Encoding: chunked")
    with connection:
        connection.sendall(b"%x\r\n%s\r\n" % (len(start), start))
        block = b"%x\r\n%s\r\n" % (4096, b"a" * 4096)
        sent = 0
        try:
            while sent < 64 * 2**20:
                connection.sendall(block)
                sent += 4096
        except OSError:  # the server has closed the connection
            pass
    assert sent < 64 * 2**20
    assert empty(served)


@pytest.mark.parametrize(("head", "start"), [(JSON, b'{"video": "'), (UPLOAD, PART + MP4)])
def test_chunked_body_over_the_limit_is_refused(serve, head, start):
    served = serve(max_json_mib=0.001, max_upload_gib=1e-6)
    body = start + b"a" * 1200
    connection = served.send_raw(f"{head}Transfer-Encoding: chunked", b"%x\r\n%s\r\n" % (len(body), body))
    status, text = read_response(connection)
    assert status == 413
    assert '"type":"invalid_request_error"' in text
    assert empty(served)


@pytest.mark.parametrize(("head", "start"), [(JSON, b"{"), (UPLOAD, PART + MP4)])
def test_slow_or_stalled_body_times_out(serve, head, start):
    served = serve(grace_s=0.2, min_kib_per_s=50)
    status, text = read_response(served.send_raw(f"{head}Content-Length: 100000", start))
    assert status == 408
    assert "below 50 KiB/s for 0.2 s" in text
    assert empty(served)


def test_steady_body_has_a_total_timeout(serve):
    served = serve(json_timeout_s=0.3, grace_s=0.1, min_kib_per_s=0.001)
    connection = served.send_raw(f"{JSON}Content-Length: 100000")
    connection.settimeout(0.02)
    received = b""
    with connection:
        while not received:
            try:
                connection.sendall(b" ")
                received = connection.recv(4096)
            except TimeoutError:
                continue
    assert b" 408 " in received
    assert b"longer than 0.3 s" in received


async def test_time_without_reads_is_not_counted():
    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"a", "more_body": True}

    async def send(_: object) -> None:
        """Discard the message."""

    limits = BodyLimits(max_bytes=100, timeout_s=0.5, min_bytes_per_s=1e6, grace_s=0.3)
    body = LimitedBody(limits, {"type": "http", "headers": []}, receive, send)
    for _ in range(50):
        assert (await body.receive())["body"] == b"a"
        await asyncio.sleep(0.02)


def test_disconnect_leaves_no_partial_file(serve):
    served = serve()
    connection = served.send_raw(f"{UPLOAD}Content-Length: 100000000", PART + MP4 + bytes(3 * 2**20))
    while not served.stored_files():
        time.sleep(0.01)
    connection.close()
    assert empty(served)
    with served.client() as client:
        assert client.get("/v1/files").json()["data"] == []


def test_rejected_upload_is_not_read_completely(serve):
    """Otherwise a client without a key could make the server read without end."""
    served = serve()
    served.secret = ""
    connection = served.send_raw(f"{UPLOAD}Content-Length: {2**30}", PART)
    status, text = read_response(connection)
    assert status == 401
    assert "connection: close" in text


def test_keep_alive_after_a_complete_body(serve):
    with serve().client() as client:
        assert "connection" not in client.post("/v1/ask", json={}).headers
        assert "connection" not in client.post("/v1/ask", json={"count": 0}).headers
