"""Who is let in: keys, sessions, hosts, origins, kinds of body, and how many at a time."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

from tests.serve.conftest import error_of, read_response
from vz_ray.config.serve import AccessConfig, UploadsConfig
from vz_ray.serve.api_keys import add_key, generate_key, revoke_key

JSON = {"content-type": "application/json"}


def test_without_a_key_nothing_is_answered_but_health_and_the_page(serve):
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


def test_wrong_revoked_and_expired_keys_are_told_alike(serve):
    served = serve()
    (gone, gone_key), (late, late_key) = generate_key("gone"), generate_key("late")
    add_key(served.keys, gone_key)
    add_key(served.keys, replace(late_key, expires_at=time.time() - 1))
    with served.client(secret=gone) as client:
        assert client.get("/v1/files").status_code == 200
        revoke_key(served.keys, "gone")
        told = {error_of(client.get("/v1/files"), 401)["message"]}
        for header in (
            f"Bearer {late}",
            "Bearer vz-wrong",
            f"Basic {served.secret}",
            served.secret,
            "Bearer",
        ):
            told.add(error_of(client.get("/v1/files", headers={"authorization": header}), 401)["message"])
    assert len(told) == 1
    assert not any(name in message for name in ("gone", "late", "keys.json") for message in told)


def test_a_browser_logs_in_once_and_scripts_cannot_read_how(serve):
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


def test_a_cookie_does_not_help_a_wrong_key(serve):
    served = serve()
    with served.client(secret="") as client:
        client.post("/session", json={"key": served.secret})
        assert client.get("/v1/files", headers={"authorization": "Bearer vz-x"}).status_code == 401


def test_cookies_of_other_servers_of_this_machine_do_no_harm(serve):
    served = serve()
    with served.client(secret="") as client:
        cookie = client.post("/session", json={"key": served.secret}).headers["set-cookie"].partition(";")[0]
    with served.client(secret="") as client:
        headers = {"cookie": f'_xsrf="{{[2|;é}}; ={{]; a b=c; {cookie}; x'.encode("latin-1")}
        assert client.get("/v1/files", headers=headers).status_code == 200


def test_who_has_shown_no_key_is_not_listened_to_for_long(serve):
    with serve().client(secret="") as client:
        error_of(client.post("/session", json={"key": "a" * 10_000}), 413)


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1", "localhost.", "", "[::2]:80"]
)
def test_without_keys_a_name_that_is_not_this_machine_s_is_refused(serve, host):
    with serve(with_keys=False).client() as client:
        assert error_of(client.get("/v1/files", headers={"host": host}), 421)["code"] == "unknown_host"


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1", "127.1.2.3:9", "[::1]:8000", "LOCALHOST"]
)
def test_without_keys_this_machine_s_own_names_are_served(serve, host):
    with serve(with_keys=False).client() as client:
        assert client.get("/v1/files", headers={"host": host}).status_code == 200


def test_names_that_are_allowed_are_the_only_ones(serve):
    with serve(allowed_hosts=["videos.example"]).client() as client:
        assert client.get("/v1/files", headers={"host": "videos.example:8000"}).status_code == 200
        error_of(client.get("/v1/files"), 421)
        assert client.get("/health").status_code == 200  # probes ask by address


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "file://", "http://[::1"]
)
def test_a_page_of_another_site_cannot_change_anything(serve, origin):
    served = serve(with_keys=False)
    with served.client() as client:
        for method, path in (("POST", "/v1/ask"), ("DELETE", "/v1/files/x"), ("POST", "/session")):
            error = error_of(client.request(method, path, json={}, headers={"origin": origin}), 403)
            assert error["code"] == "cross_origin"
        assert client.post("/v1/ask", json={}, headers={"origin": served.url}).status_code == 200


def test_behind_a_proxy_the_origin_is_an_allowed_name(serve):
    with serve(allowed_hosts=["videos.example", "127.0.0.1"]).client() as client:
        good, bad = "https://videos.example", "https://videos.example:8443"
        assert client.post("/v1/ask", json={}, headers={"origin": good}).status_code == 200
        error_of(client.post("/v1/ask", json={}, headers={"origin": bad}), 403)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"])
def test_what_a_form_can_send_is_no_json(serve, kind):
    with serve().client() as client:
        headers = {"content-type": kind} if kind else {}
        response = client.post("/v1/ask", content=b"{}", headers=headers)
        assert error_of(response, 415)["code"] == "unsupported_media_type"
        error_of(client.post("/v1/files", content=b"{}", headers=headers), 415)
        charset = {"content-type": "application/json; charset=utf-8"}
        assert client.post("/v1/ask", content=b"{}", headers=charset).status_code == 200


def test_browsers_are_told_to_take_nothing_from_elsewhere(serve):
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


def test_one_key_has_so_many_requests_in_progress_and_another_its_own(serve):
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


def test_requests_that_were_given_up_or_refused_do_not_count_for_ever(serve):
    served = serve(max_requests_per_key=1)
    head = "POST /v1/ask HTTP/1.1\nContent-Type: application/json\nContent-Length: 100"
    for _ in range(3):
        served.send_raw(head, b"{").close()
    with served.client() as client:
        while client.post("/v1/ask", json={}).status_code == 429:
            time.sleep(0.01)
        error_of(client.post("/v1/ask", json={"count": 0}), 400)
        assert client.post("/v1/ask", json={}).status_code == 200


def test_web_sockets_are_not_spoken(serve):
    head = (
        "GET /v1/ask HTTP/1.1\nConnection: Upgrade\nUpgrade: websocket\n"
        "Sec-WebSocket-Version: 13\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
    )
    connection = serve().send_raw(head)
    with connection:
        assert not connection.recv(4096).startswith(b"HTTP/1.1 101")


def test_a_request_without_a_host_is_refused(serve):
    served = serve(with_keys=False)
    connection = served.send_raw("GET /v1/files HTTP/1.1\nConnection: close\nHost: a.example")
    status, _ = read_response(connection)  # with the one that is always sent there are two
    assert status in (400, 421)


@pytest.mark.parametrize(
    ("section", "wrong", "message"),
    [
        (AccessConfig, {"max_json_mib": 0}, "max_json_mib is 0"),
        (AccessConfig, {"max_requests_per_key": 0}, "max_requests_per_key is 0"),
        (AccessConfig, {"allowed_hosts": ["https://a"]}, "allowed_hosts has 'https://a'"),
        (AccessConfig, {"allowed_hosts": ["a:80"]}, "must have no port"),
        (UploadsConfig, {"ttl_days": -1}, "ttl_days is -1"),
        (UploadsConfig, {"allowed_dirs": ["videos"]}, "must be an absolute path"),
        (UploadsConfig, {"allowed_dirs": ["/"]}, "every file of the server"),
    ],
)
def test_options_that_make_no_sense_are_named(section, wrong, message):
    with pytest.raises(ValueError, match=message):
        section(**wrong)
