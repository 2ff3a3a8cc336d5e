"""Access control: keys, sessions, hosts, origins, content types, requests in progress."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import replace

import pytest

from tests.serve.conftest import error_of, read_response
from vz_ray.config import ConfigError, load_config
from vz_ray.config.serve import ServeConfig
from vz_ray.serve.api_keys import add_key, generate_key, revoke_key

JSON = {"content-type": "application/json"}


def test_only_health_and_page_need_no_key(serve):
    served = serve()
    with served.client(secret="") as client:
        assert client.get("/health").status_code == 200
        assert client.get("/").status_code == 200
        assert client.get("/static/none.js").status_code == 404
        for method, path in (
            ("GET", "/v1/files"),
            ("POST", "/v1/ask"),
            ("GET", "/openapi.json"),
            ("GET", "/x"),
        ):
            response = client.request(method, path)
            assert error_of(response, 401)["code"] == "missing_api_key"
            assert response.headers["www-authenticate"].startswith("Bearer")
        for path in ("/static/../v1/files", "/static/%2e%2e/v1/files", "//v1/files"):
            assert client.get(path).status_code in (401, 404)
        assert client.post("/", headers=JSON).status_code == 401
        assert client.post("/health", headers=JSON).status_code == 401


def test_wrong_revoked_expired_keys_get_the_same_error(serve):
    served = serve()
    (gone, gone_key), (late, late_key) = generate_key("gone"), generate_key("late")
    add_key(served.keys, gone_key)
    add_key(served.keys, replace(late_key, expires_at=time.time() - 1))
    with served.client(secret=gone) as client:
        assert client.get("/v1/files").status_code == 200
        revoke_key(served.keys, "gone")
        messages = {error_of(client.get("/v1/files"), 401)["message"]}
        for header in (
            f"Bearer {late}",
            "Bearer vz-wrong",
            f"Basic {served.secret}",
            served.secret,
            "Bearer",
        ):
            messages.add(error_of(client.get("/v1/files", headers={"authorization": header}), 401)["message"])
    assert len(messages) == 1
    assert not any(name in message for name in ("gone", "late", "keys.json") for message in messages)


def test_login_sets_http_only_cookie(serve):
    served = serve()
    with served.client(secret="") as client:
        assert client.get("/session").json() == {"needs_key": True, "name": None}
        assert error_of(client.post("/session", json={"key": "vz-wrong"}), 401)["code"] == "invalid_api_key"
        response = client.post("/session", json={"key": served.secret})
        cookie = response.headers["set-cookie"]
        assert served.secret not in cookie
        for word in ("HttpOnly", "SameSite=strict", "Path=/", "Max-Age=43200"):
            assert word in cookie
        assert client.get("/session").json() == {"needs_key": False, "name": "alice"}
        assert client.get("/v1/files").status_code == 200
        assert client.delete("/session").status_code == 204
        assert error_of(client.get("/v1/files"), 401)["code"] == "missing_api_key"
        client.post("/session", json={"key": served.secret})
        revoke_key(served.keys, "alice")
        assert error_of(client.get("/v1/files"), 401)["code"] == "session_ended"


def test_wrong_key_is_rejected_despite_cookie(serve):
    served = serve()
    with served.client(secret="") as client:
        client.post("/session", json={"key": served.secret})
        assert client.get("/v1/files", headers={"authorization": "Bearer vz-x"}).status_code == 401


def test_foreign_cookies_are_ignored(serve):
    served = serve()
    with served.client(secret="") as client:
        cookie = client.post("/session", json={"key": served.secret}).headers["set-cookie"].partition(";")[0]
    with served.client(secret="") as client:
        headers = {"cookie": f'_xsrf="{{[2|;é}}; ={{]; a b=c; {cookie}; x'.encode("latin-1")}
        assert client.get("/v1/files", headers=headers).status_code == 200


def test_login_body_is_limited(serve):
    with serve().client(secret="") as client:
        error_of(client.post("/session", json={"key": "a" * 10_000}), 413)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1", "localhost.", "", "[::2]:80"])
def test_foreign_host_is_rejected_without_keys(serve, host):
    with serve(with_keys=False).client() as client:
        assert error_of(client.get("/v1/files", headers={"host": host}), 421)["code"] == "unknown_host"


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1", "127.1.2.3:9", "[::1]:8000", "LOCALHOST"])
def test_loopback_hosts_are_accepted_without_keys(serve, host):
    with serve(with_keys=False).client() as client:
        assert client.get("/v1/files", headers={"host": host}).status_code == 200


def test_only_allowed_hosts_are_accepted(serve):
    with serve(allowed_hosts=["videos.example"]).client() as client:
        assert client.get("/v1/files", headers={"host": "videos.example:8000"}).status_code == 200
        error_of(client.get("/v1/files"), 421)
        assert client.get("/health").status_code == 200  # health checks use the address


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "file://", "http://[::1"])
def test_cross_origin_requests_are_rejected(serve, origin):
    served = serve(with_keys=False)
    with served.client() as client:
        for method, path in (("POST", "/v1/ask"), ("DELETE", "/v1/files/x"), ("POST", "/session")):
            error = error_of(client.request(method, path, json={}, headers={"origin": origin}), 403)
            assert error["code"] == "cross_origin"
        assert client.post("/v1/ask", json={}, headers={"origin": served.url}).status_code == 200


def test_origin_may_be_an_allowed_host(serve):
    with serve(allowed_hosts=["videos.example", "127.0.0.1"]).client() as client:
        good, bad = "https://videos.example", "https://videos.example:8443"
        assert client.post("/v1/ask", json={}, headers={"origin": good}).status_code == 200
        error_of(client.post("/v1/ask", json={}, headers={"origin": bad}), 403)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"])
def test_form_content_types_are_rejected(serve, kind):
    with serve().client() as client:
        headers = {"content-type": kind} if kind else {}
        response = client.post("/v1/ask", content=b"{}", headers=headers)
        assert error_of(response, 415)["code"] == "unsupported_media_type"
        error_of(client.post("/v1/files", content=b"{}", headers=headers), 415)
        charset = {"content-type": "application/json; charset=utf-8"}
        assert client.post("/v1/ask", content=b"{}", headers=charset).status_code == 200


def test_responses_have_security_headers(serve):
    with serve().client() as client:
        for response in (
            client.get("/"),
            client.get("/nothing"),
            client.get("/v1/fail"),
            client.get("/health"),
        ):
            assert "default-src 'none'" in response.headers["content-security-policy"]
            assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
            assert "unsafe" not in response.headers["content-security-policy"]
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["referrer-policy"] == "no-referrer"
    with serve().client(secret="") as client:
        assert client.get("/v1/files").headers["x-content-type-options"] == "nosniff"


def test_request_limit_applies_per_key(serve):
    served = serve(max_requests_per_key=2)
    bob, key = generate_key("bob")
    add_key(served.keys, key)

    def hold(secret: str) -> None:
        with served.client(secret=secret) as client:
            assert client.post("/v1/hold", json={}).status_code == 200

    threads = [threading.Thread(target=hold, args=(served.secret,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    while len(served.busy) < 2:
        time.sleep(0.01)
    with served.client() as client:
        response = client.post("/v1/ask", json={})
        assert error_of(response, 429)["type"] == "rate_limit_error"
        assert int(response.headers["retry-after"]) >= 1
        assert client.get("/health").status_code == 200
        assert client.get("/").status_code == 200
    with served.client(secret=bob) as client:
        assert client.post("/v1/ask", json={}).status_code == 200
    served.hold.set()
    for thread in threads:
        thread.join()
    with served.client() as client:
        assert client.post("/v1/ask", json={}).status_code == 200


def test_aborted_requests_free_their_slots(serve):
    served = serve(max_requests_per_key=1)
    head = "POST /v1/ask HTTP/1.1\nContent-Type: application/json\nContent-Length: 100"
    for _ in range(3):
        served.send_raw(head, b"{").close()
    with served.client() as client:
        while client.post("/v1/ask", json={}).status_code == 429:
            time.sleep(0.01)
        error_of(client.post("/v1/ask", json={"count": 0}), 400)
        assert client.post("/v1/ask", json={}).status_code == 200


def test_websockets_are_rejected(serve):
    head = (
        "GET /v1/ask HTTP/1.1\nConnection: Upgrade\nUpgrade: websocket\n"
        "Sec-WebSocket-Version: 13\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
    )
    connection = serve().send_raw(head)
    with connection:
        assert not connection.recv(4096).startswith(b"HTTP/1.1 101")


def test_ambiguous_host_is_rejected(serve):
    served = serve(with_keys=False)
    connection = served.send_raw("GET /v1/files HTTP/1.1\nConnection: close\nHost: a.example")
    status, _ = read_response(connection)  # `send_raw` adds a second Host header
    assert status in (400, 421)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("access.max_json_mib=0", "access.max_json_mib is 0"),
        ("access.max_requests_per_key=0", "access.max_requests_per_key is 0"),
        ("access.allowed_hosts=['https://a']", "access.allowed_hosts has 'https://a'"),
        ("access.allowed_hosts=['a:80']", "access.allowed_hosts has 'a:80'; a host must have no port"),
        ("files.ttl_days=-1", "files.ttl_days is -1"),
        ("files.allowed_dirs=[videos]", "files.allowed_dirs has 'videos'; it must be an absolute path"),
        ("files.allowed_dirs=[/]", "files.allowed_dirs has '/', which is every file of the server"),
    ],
)
def test_invalid_options_are_named_with_their_section(override, message):
    with pytest.raises(ConfigError, match=re.escape(f"override '{override}': {message}")):
        load_config(ServeConfig, None, [override])
