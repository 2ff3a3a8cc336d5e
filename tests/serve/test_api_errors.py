"""Error responses: format, and details that they must not contain."""

from __future__ import annotations

import logging

import httpx
import openai
import pytest

from tests.serve.conftest import error_of


def test_unknown_path_and_method_are_openai_errors(serve):
    with serve().client() as client:
        assert error_of(client.get("/v1/nothing"), 404)["code"] == "unknown_url"
        response = client.get("/v1/ask")
        assert error_of(response, 405)["code"] == "method_not_allowed"
        assert "POST" in response.headers["allow"]


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b'{"count": ', "invalid_json", None),
        (b"\xff\xfe", "invalid_json", None),
        (b"[" * 100_000, "invalid_json", None),
        (b'{"count": 1' + b"0" * 5000 + b"}", "invalid_json", None),
        (b'{"count": "three"}', "invalid_value", "count"),
        (b'{"count": 0}', "invalid_value", "count"),
        (b'{"count": null}', "invalid_value", "count"),
        (b'{"video": ["a"]}', "invalid_value", "video"),
        (b'{"colour": "red"}', "unknown_parameter", "colour"),
        (b"[]", "invalid_value", None),
        (b"", "missing_parameter", None),
    ],
)
def test_invalid_request_names_the_field(serve, body, code, param):
    with serve().client() as client:
        response = client.post("/v1/ask", content=body, headers={"content-type": "application/json"})
        error = error_of(response, 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["code"] == code


def test_error_does_not_repeat_the_value(serve):
    with serve().client() as client:
        response = client.post("/v1/ask", json={"count": "a" * 5000})
        error_of(response, 400)
    assert "aaaa" not in response.text


def test_unhandled_exception_returns_only_the_request_id(serve, caplog):
    with serve().client() as client, caplog.at_level(logging.ERROR, "vz_ray.serve.api_errors"):
        response = client.get("/v1/fail", headers={"x-request-id": "mine-1"})
    error = error_of(response, 500)
    assert error["type"] == "server_error"
    assert "secret" not in response.text
    assert "uploads" not in response.text
    assert "mine-1" in error["message"]
    (record,) = [r for r in caplog.records if r.name == "vz_ray.serve.api_errors"]
    assert "mine-1" in record.getMessage()
    assert "a secret of" in str(record.exc_info and record.exc_info[1])


def test_unsafe_request_ids_are_replaced(serve):
    with serve().client() as client:
        request_id = client.get("/health", headers={"x-request-id": "a b"}).headers["x-request-id"]
        assert request_id.startswith("req_")
        assert client.get("/health", headers={"x-request-id": "a.b"}).headers["x-request-id"] == "a.b"


def test_video_error_hides_the_path(serve):
    with serve().client() as client:
        response = client.get("/v1/refused")
    assert error_of(response, 400)["code"] == "source_not_allowed"
    assert "uploads" not in response.text


def test_overload_error_has_retry_after(serve):
    with serve().client() as client:
        response = client.get("/v1/full")
    assert error_of(response, 503)["code"] == "overloaded"
    assert response.headers["retry-after"] == "7"


def test_failing_stream_closes_the_connection(serve):
    with serve().client() as client, pytest.raises(httpx.RemoteProtocolError):
        client.get("/v1/midway")


def test_openai_client_raises_its_error_types(serve):
    served = serve()
    client = openai.OpenAI(api_key="vz-wrong", base_url=f"{served.url}/v1", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="not valid"):
        client.files.list()
    client = openai.OpenAI(api_key=served.secret, base_url=f"{served.url}/v1", max_retries=0)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve("file-" + "0" * 32)
    with pytest.raises(openai.BadRequestError, match="neither a video"):
        client.files.create(file=("a.mp4", b"text"), purpose="user_data")
