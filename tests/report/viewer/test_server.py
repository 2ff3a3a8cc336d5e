"""HTTP server of the viewer: access control, files, episodes and the command."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest
from fastapi.testclient import TestClient

from tests.command_line import run_command
from tests.report.viewer.conftest import Open
from tests.report.viewer.run_factory import LightEpisode, light_line, write_light_run
from vz_ray.report.viewer.access_control import parse_host
from vz_ray.report.viewer.episode_row import EpisodeParseError
from vz_ray.report.viewer.server import _json, create_viewer_app
from vz_ray.report.viewer.viewer_session import ViewerSession
from vz_ray.utils.errors import UserError

SMALL = LightEpisode(frames=2, tokens=2)
LOCAL = "http://127.0.0.1"


@pytest.fixture
def client(run: Path, open_run: Open) -> TestClient:
    return TestClient(create_viewer_app(open_run(run)), base_url=LOCAL)


def light_client(run: Path, open_run: Open) -> TestClient:
    return TestClient(create_viewer_app(open_run(run)), base_url=LOCAL)


# -- access control --------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8765", "localhost:80", "[::1]:9", "127.0.0.2"])
def test_loopback_hosts_are_accepted(client: TestClient, host: str) -> None:
    assert client.get("/api/state", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.7", "", "localhost.evil"]
)
def test_other_hosts_are_rejected(client: TestClient, host: str) -> None:
    for path in ("/", "/api/state", "/video/1", "/static/main.js"):
        answer = client.get(path, headers={"host": host})
        assert answer.status_code == 403
        assert "episodes" not in answer.text


def test_key_is_required_beyond_loopback(run: Path, open_run: Open) -> None:
    app = create_viewer_app(open_run(run), host="0.0.0.0", key="secret")
    client = TestClient(app, base_url="http://10.0.0.7", follow_redirects=False)
    assert client.get("/").status_code == 403
    assert client.get("/", params={"key": "wrong"}).status_code == 403
    opened = client.get("/", params={"key": "secret"})
    assert (opened.status_code, opened.headers["location"]) == (303, "/")
    assert "HttpOnly" in opened.headers["set-cookie"]
    assert client.get("/api/state").status_code == 200
    assert client.get("/api/state", headers={"host": "evil.example"}).status_code == 403


def test_responses_have_security_headers(client: TestClient) -> None:
    for path in ("/", "/static/main.js", "/api/state", "/nothing", "/video/1"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize(
    ("header", "host"),
    [("a", "a"), ("a:1", "a"), ("[::1]:1", "::1"), ("[::1]", "::1"), ("::1", "::1"), ("", "")],
)
def test_parse_host(header: str, host: str) -> None:
    assert parse_host(header) == host


# -- files --------------------------------------------------------------------------


def test_pages_load_no_external_files(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    names = re.findall(r'(?:src|href)="(/[^"]+)"', page.text)
    scripts = [name for name in names if name.endswith(".js")]
    while scripts:
        name = scripts.pop()
        script = client.get(name).text
        more = {urljoin(name, target) for target in re.findall(r'from "([^"]+)"', script)} - set(names)
        scripts += more
        names += more
        assert "innerHTML" not in script
        assert "eval(" not in script
    assert len(names) > 12
    for name in names:
        answer = client.get(name)
        assert answer.status_code == 200
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", answer.text)
        assert "url(" not in answer.text
    assert not re.search(r"<script(?! type=\"module\" src)|\son\w+=|<style|\sstyle=", page.text)


@pytest.mark.parametrize(
    "path",
    [
        "/static/../server.py", "/static/%2e%2e/server.py", "/static/..%2fserver.py", "/static/__init__.py",
        "/web/../cli.py", "/video/..%2f..%2fetc%2fpasswd", "/video//etc/passwd", "/etc/passwd",
        "/api/episode/../../etc/passwd", "/docs", "/openapi.json",
    ],
)  # fmt: skip
def test_request_paths_are_not_opened(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code in (404, 422)
    assert "root:" not in answer.text


def test_video_ranges_are_served(client: TestClient, run: Path) -> None:
    number = client.get("/api/episode/1").json()["video"]
    content = Path(client.get("/api/episode/1").json()["task"]["video"]).read_bytes()
    whole = client.get(f"/video/{number}")
    assert whole.content == content
    assert (whole.headers["content-type"], whole.headers["accept-ranges"]) == ("video/mp4", "bytes")
    part = client.get(f"/video/{number}", headers={"range": "bytes=100-299"})
    assert (part.status_code, part.content) == (206, content[100:300])
    assert part.headers["content-range"] == f"bytes 100-299/{len(content)}"
    end = client.get(f"/video/{number}", headers={"range": "bytes=-50"})
    assert end.content == content[-50:]
    beyond = client.get(f"/video/{number}", headers={"range": f"bytes={len(content)}-"})
    assert beyond.status_code == 416
    assert client.head(f"/video/{number}").headers["content-length"] == str(len(content))


def named(run: Path, video: str) -> Path:
    """Create a run with one episode that uses `video`."""
    write_light_run(run, 1, SMALL)
    log = run / "episodes" / "000000.jsonl"
    log.write_text(log.read_text().replace("/videos/0.mp4", video))
    return run


@pytest.mark.parametrize(
    "video", ["/etc/passwd", "secret.txt", "concat.mp4", "/dev/zero", "/", "http://127.0.0.1/v.mp4"]
)
def test_only_videos_are_served(tmp_path: Path, open_run: Open, video: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("secret.txt").write_text("a secret")
    Path("concat.mp4").write_text("ffconcat version 1.0\nfile /etc/passwd\n")
    client = light_client(named(tmp_path / "run", video), open_run)
    answer = client.get("/video/1")
    assert answer.status_code == 404
    assert answer.json()["error"].startswith(video)
    assert client.get("/api/video/1").json()["error"].startswith(video)


def test_unknown_video_is_not_found(client: TestClient) -> None:
    assert client.get("/video/77").json() == {"error": "no episode of this run uses video 77"}
    for number in (0, -1, 2**70):
        assert client.get(f"/video/{number}").status_code == 404


# -- episodes -----------------------------------------------------------------------


def test_frames_match_the_episode(client: TestClient) -> None:
    view = client.get("/api/episode/1").json()
    for turn, frames in [
        (0, view["overview"]),
        *[(k, turn["frames"]) for k, turn in enumerate(view["turns"], 1)],
    ]:
        if frames is None:
            continue
        strip = client.get(f"/api/episode/1/frames/{turn}").json()
        assert strip["error"] == ""
        assert len(strip["frames"]) == frames["count"]
        assert all(frame.startswith("data:image/") for frame in strip["frames"])
    last = len(view["turns"])
    assert client.get(f"/api/episode/1/frames/{last}").json() == {"error": f"episode 1 has no frames after turn {last}"}
    assert client.get("/api/episode/1/frames/-1").status_code == 404
    assert client.get("/api/episode/1/frames/99").status_code == 404


def test_frames_of_a_changed_video_are_rejected(run: Path, open_run: Open, tmp_path: Path) -> None:
    log = run / "episodes" / "000000.jsonl"
    first = json.loads(log.read_text().splitlines()[0])["task"]["video"]
    other = next(path for path in Path(first).parent.glob("*.mp4") if str(path) != first)
    copy = tmp_path / "changed.mp4"
    shutil.copy(other, copy)
    log.write_text(log.read_text().replace(first, str(copy)))
    client = light_client(run, open_run)
    number = next(row["id"] for row in client.get("/api/episodes?step_to=0").json()["rows"])
    strip = client.get(f"/api/episode/{number}/frames/0").json()
    assert strip["frames"] == []
    assert "differs from its reference, the file has changed" in strip["error"]


def test_missing_video_is_reported(tmp_path: Path, open_run: Open) -> None:
    client = light_client(named(tmp_path / "run", "/videos/gone.mp4"), open_run)
    message = "/videos/gone.mp4: no such file; check the path"
    assert client.get("/api/video/1").json() == {"error": message}
    assert client.get("/api/episode/1/frames/0").json() == {"error": message, "frames": []}


def test_invalid_query_has_a_message(client: TestClient) -> None:
    for query, why in (
        ("sort=colour", "query.sort: Input should be 'newest', "),
        ("step_from=x", "query.step_from: Input should be a valid integer"),
        ("reward_from=nan", "query.reward_from: Input should be a finite number"),
        ("limit=100000", "query.limit: Input should be less than or equal to 200"),
        (f"offset={2**63}", "query.offset: Input should be less than or equal to "),
        ("text=" + "x" * 300, "query.text: String should have at most 200 characters"),
    ):
        answer = client.get(f"/api/episodes?{query}")
        assert answer.status_code == 422
        assert answer.json()["error"].startswith(why)
    assert client.get("/api/episode/999").status_code == 404
    assert client.get("/api/episode/0").json() == {"error": "no item has the id 0"}


def test_non_finite_number_raises() -> None:
    with pytest.raises(EpisodeParseError, match="a non-finite number"):
        _json({"logprobs": [float("inf")]})


def test_episode_with_infinite_logprob_is_listed(tmp_path: Path, open_run: Open) -> None:
    run = write_light_run(tmp_path / "run", 1, SMALL)
    line = json.loads(light_line(0, SMALL))
    line["trajectory"]["turns"][0]["action"]["logprobs"][0] = 12345.5
    (run / "episodes" / "000000.jsonl").write_text(json.dumps(line).replace("12345.5", "-1e999") + "\n")
    client = light_client(run, open_run)
    assert client.get("/api/episodes").json()["total"] == 1
    answer = client.get("/api/episode/1")
    assert (answer.status_code, answer.json()["error"]) == (
        422,
        "the episode has a non-finite number and cannot be displayed",
    )


# -- runs ---------------------------------------------------------------------------


def test_missing_and_invalid_runs_raise(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run directory at .*: check the name"):
        ViewerSession(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"is not a run directory: config\.yaml, episodes/ and eval/ are missing"):
        ViewerSession(tmp_path)


def test_run_without_episodes_has_an_empty_list(tmp_path: Path, open_run: Open) -> None:
    run = tmp_path / "young"
    run.mkdir()
    (run / "config.yaml").write_text("name: young\n")
    client = light_client(run, open_run)
    assert client.get("/api/episodes").json()["rows"] == []
    assert client.get("/api/charts").json() == {"width": 1, "stages": [], "outcomes": []}
    assert client.get("/api/filter_options").json()["stages"] == []


def test_invalid_config_only_hides_token_texts(tmp_path: Path, open_run: Open) -> None:
    run = write_light_run(tmp_path / "run", 3, SMALL)
    (run / "config.yaml").write_text("model: [\n")
    assert light_client(run, open_run).get("/api/episode/1").json()["turns"][0]["sampled"]["texts"] is None


# -- the command --------------------------------------------------------------------


@pytest.fixture
def command(run: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-m", "vz_ray.cli", "view", str(run), "--port", "0"]
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": "/usr/bin"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    yield process
    process.kill()
    process.communicate()


def test_command_prints_its_address_and_stops(command: subprocess.Popen[str], tmp_path: Path) -> None:
    assert command.stdout is not None
    address = command.stdout.readline().split()[-1]
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
    for _ in range(300):
        try:
            state = httpx.get(f"{address}api/state").json()
        except httpx.TransportError:
            state = {}
        if state.get("episodes") == 54:
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"not served: {state}")
    assert list((tmp_path / "cache" / "vz_ray" / "view").glob("*.sqlite"))
    command.send_signal(signal.SIGINT)
    _, errors = command.communicate(timeout=30)
    assert (command.returncode, errors) == (0, "")


def test_port_in_use_is_reported(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run_command(monkeypatch, "view", str(run), "--port", str(port)) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"vz-ray: cannot listen on 127.0.0.1, port {port}: ")
    assert message.endswith("; give another --host or --port\n")
