"""Files of the web page, and its modules without DOM access, in a browser."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from posixpath import dirname, join, normpath
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient

from vz_ray.config.serve import AccessConfig
from vz_ray.serve.access_control import CONTENT_SECURITY_POLICY, install_access_control
from vz_ray.serve.api_errors import invalid_request, overloaded
from vz_ray.serve.api_keys import ApiKeyStore, add_key, generate_key
from vz_ray.serve.chat_response import format_sse
from vz_ray.serve.page import load_page_assets, page_router

ASSETS = {path: asset.content.decode() for path, asset in load_page_assets().items()}
REFERENCE = {
    "text/html": re.compile(r'(?:href|src)="([^"#]+)"'),
    "text/javascript": re.compile(r'(?:from|import) "([^"]+)"'),
    "text/css": re.compile(r"url\(([^)]+)\)"),
}


def application(keys: ApiKeyStore | None = None) -> FastAPI:
    app = FastAPI()
    app.include_router(page_router())
    install_access_control(app, AccessConfig(), keys)
    return app


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(application(), base_url="http://127.0.0.1")


# -- files ---------------------------------------------------------------------------


def test_all_referenced_assets_are_served(client: TestClient):
    seen, queue = set(), ["/"]
    while queue:
        path = queue.pop()
        if path in seen:
            continue
        seen.add(path)
        answer = client.get(path)
        assert answer.status_code == 200, path
        kind = answer.headers["content-type"].partition(";")[0]
        links = REFERENCE[kind].findall(answer.text) if kind in REFERENCE else []
        queue += [normpath(join(dirname(path), name)) for name in links]
    assert seen <= set(ASSETS)
    # The page shares this component with the episode viewer.
    assert "/static/web/timeline.js" in seen
    # Each file must be referenced.
    assert {path for path in ASSETS if "/web/" not in path} <= seen


@pytest.mark.parametrize("path", ASSETS)
def test_page_has_no_external_resources(path: str):
    # Allowed: the SVG namespace, and the placeholder and pattern of the URL input.
    text = ASSETS[path].replace("http://www.w3.org/2000/svg", "").replace("https://…", "").replace("https?://.+", "")
    assert not re.search(r"https?://|[\"'(]//\w", text)


@pytest.mark.parametrize("path", ASSETS)
def test_page_has_no_inline_code_or_markup_injection(path: str):
    text = ASSETS[path]
    if path == "/":
        assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", text)
        assert all(tag.endswith("></script>") for tag in re.findall(r"<script.*", text))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)


def test_asset_headers(client: TestClient):
    for path in ("/", "/static/main.js"):
        answer = client.get(path)
        assert answer.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-content-type-options"] == "nosniff"
        same = client.get(path, headers={"if-none-match": f'"other", W/{answer.headers["etag"]}'})
        assert (same.status_code, same.content) == (304, b"")
        head = client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["etag"] == answer.headers["etag"]


@pytest.mark.parametrize(
    "path",
    [
        "/static/index.html",
        "/static/../page.py",
        "/static/%2e%2e/page.py",
        "/static/web/__init__.py",
        "/static/",
        "/page.css",
    ],
)
def test_unknown_assets_are_missing(client: TestClient, path: str):
    assert client.get(path).status_code == 404


def test_page_needs_no_key(tmp_path):
    _, key = generate_key("alice")
    add_key(tmp_path / "keys.json", key)
    guarded = TestClient(application(ApiKeyStore(tmp_path / "keys.json")), base_url="http://127.0.0.1")
    assert {path: guarded.get(path).status_code for path in ASSETS} == dict.fromkeys(ASSETS, 200)
    assert guarded.get("/session").json() == {"needs_key": True, "name": None}


# -- modules without DOM access, in a browser ------------------------------------------------------------


@pytest.fixture(scope="module")
def module(chromium: Any) -> Iterator[Any]:
    """Call an export of a module: `module("chat_request.js", "m => m.chosenOption('B', [])")`."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(application(), log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    page = chromium.new_page()
    page.goto(f"http://127.0.0.1:{listener.getsockname()[1]}/static/sse.js")
    yield lambda name, code, argument=None: page.evaluate(
        f"async (argument) => ({code})(await import('/static/{name}'), argument)", argument
    )
    server.should_exit = True
    thread.join()


STREAM = (
    ': a comment\n\ndata: {"a": "ä"}\n\nretry: 5000\ndata: one\ndata:two\n\n'
    'event: x\ndata: {"b":1}\r\n\r\ndata: [DONE]\n\n'
)
EVENTS = [
    {"data": '{"a": "ä"}', "retry": None},
    {"data": "one\ntwo", "retry": 5000},
    {"data": '{"b":1}', "retry": None},
    {"data": "[DONE]", "retry": None},
]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 1000])
def test_sse_events_are_independent_of_chunks(module: Any, length: int):
    pieces = [STREAM[offset : offset + length] for offset in range(0, len(STREAM), length)]
    code = "(m, pieces) => { const parser = new m.EventParser(); return pieces.flatMap((text) => parser.feed(text)); }"
    assert module("sse.js", code, pieces) == EVENTS


def test_incomplete_sse_event_is_buffered(module: Any):
    code = "(m) => { const e = new m.EventParser(); return [e.feed('data: 1'), e.feed('\\n'), e.feed('\\n')]; }"
    assert module("sse.js", code) == [[], [], [{"data": "1", "retry": None}]]


def test_sse_error_has_retry_delay(module: Any):
    refused = overloaded("64 requests are waiting already.", 5.0, status=503)
    text = format_sse(refused.body(), refused.retry_after_s)
    (event,) = module("sse.js", "(m, text) => new m.EventParser().feed(text)", text)
    assert (json.loads(event["data"]), event["retry"]) == (refused.body(), 5000)
    (event,) = module("sse.js", "(m, text) => new m.EventParser().feed(text)", format_sse(invalid_request("no").body()))
    assert event["retry"] is None


def test_history_has_answered_exchanges_and_videos_first(module: Any):
    argument = {
        "videos": [{"id": "file-1"}, {"id": None, "url": "https://a.example/v.mp4"}],
        "exchanges": [
            {"question": "failed?", "answer": ""},
            {"question": "one?", "answer": "1"},
            {"question": "stopped?", "answer": ""},
        ],
    }
    messages = module("chat_request.js", "(m, g) => m.messagesOf(g.videos, g.exchanges, 'two?')", argument)
    assert messages == [
        {
            "role": "user",
            "content": [
                {"type": "file", "file": {"file_id": "file-1"}},
                {"type": "video_url", "video_url": {"url": "https://a.example/v.mp4"}},
                {"type": "text", "text": "one?"},
            ],
        },
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two?"},
    ]


def test_page_request_is_valid(module: Any):
    from vz_ray.serve.chat_request import parse_request

    messages = "m.messagesOf([{ id: 'file-1' }], [], 'q')"
    code = f"(m, zooms) => JSON.stringify(m.requestOf('zoomer', {messages}, zooms))"
    for zooms in (None, 0, 3):
        parsed = parse_request(module("chat_request.js", code, zooms).encode())
        assert parsed.stream
        assert parsed.vz_ray.max_zooms == zooms
        assert parsed.vz_ray.thumbnails == 96


@pytest.mark.parametrize(
    ("question", "stem", "options"),
    [
        ("What flashes? A. disc B. ring", "What flashes?", [["A", "disc"], ["B", "ring"]]),
        (
            "Which?\nA) one\nB) two words\nC) three",
            "Which?",
            [["A", "one"], ["B", "two words"], ["C", "three"]],
        ),
        ("Who is J. S. Bach?", "Who is J. S. Bach?", []),
        ("Is vitamin A. in it?", "Is vitamin A. in it?", []),
        ("A. red B. blue D. none", "", [["A", "red"], ["B", "blue D. none"]]),
    ],
)
def test_options_are_parsed_from_the_question(module: Any, question: str, stem: str, options: list[list[str]]):
    assert module("chat_request.js", "(m, text) => m.optionsOf(text)", question) == {
        "stem": stem,
        "options": options,
    }


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("B. ring", "B"),
        ("Bring", ""),
        ("C", ""),
        ("", ""),
        ("A ring", ""),
        ("Ring", "B"),
    ],
)
def test_chosen_option_of_an_answer(module: Any, answer: str, letter: str):
    assert module("chat_request.js", "(m, a) => m.chosenOption(a, [['A', 'disc'], ['B', 'ring']])", answer) == letter


def test_number_formatting(module: Any):
    sizes = module("format.js", "(m) => [59_000, 3.4e6, 1.25e9].map(m.size)")
    assert sizes == ["59 KB", "3.4 MB", "1.3 GB"]
    times = module("format.js", "(m) => [0.2, 59.1, 150, 4800].map(m.timeLeft)")
    assert times == ["1 s", "60 s", "3 min", "1 h 20 min"]
