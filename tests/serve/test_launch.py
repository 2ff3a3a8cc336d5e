"""The commands `vz-ray serve`, `ask` and `roll`."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serve.test_server_lifecycle import changed
from tests.video.sample_videos import VideoSpec, write_video

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

START_S = 400.0


def vz_ray(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vz_ray.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    write_video(folder, VideoSpec("v.mp4", frames=300))
    return folder


def settings(folder: Path) -> list[str]:
    return [
        "model=assets/tiny-base",
        f"log_dir={folder}/logs",
        f"files.directory={folder}/uploads",
        "clips.disk_cache_gib=0",
        "engine.kv_cache_gib=0.25",
    ]


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """Address of a server that is stopped with Ctrl-C at the end."""
    command = [
        sys.executable,
        "-m",
        "vz_ray.cli",
        "serve",
        "conf/serve/tiny.yaml",
        "port=0",
        *settings(folder),
    ]
    with (folder / "out.txt").open("w") as out:
        process = psutil.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        end_time = time.monotonic() + START_S
        while "is serving at" not in (message := (folder / "out.txt").read_text()):
            assert process.poll() is None, message
            assert time.monotonic() < end_time, message
            time.sleep(0.5)
        yield next(word for word in message.split() if word.startswith("http://"))
        children = process.children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0, (folder / "out.txt").read_text()
        gone, alive = psutil.wait_procs(children, timeout=10)
        assert not alive, alive
        assert gone
        assert not (folder / "logs/server.json").exists()


def test_ask_prints_answer_of_a_server(url: str, folder: Path):
    result = vz_ray("ask", str(folder / "v.mp4"), "What is it? A. disc B. ring", "--server", url)
    assert result.returncode == 0, result.stderr
    assert "overview of 6 frames" in result.stdout
    assert not [file for file in (folder / "uploads").rglob("*") if file.is_file()]


def test_roll_and_roll_back(url: str, folder: Path, tmp_path: Path):
    other = changed(tmp_path / "other")
    assert "no previous weights" in vz_ray("roll", "--back", "--log-dir", f"{folder}/logs").stderr
    rolled = vz_ray("roll", str(other), "--log-dir", f"{folder}/logs")
    assert rolled.returncode == 0, rolled.stderr
    assert f"serving version 2: {other}" in rolled.stdout
    assert httpx.get(f"{url}/v1/models").json()["data"][1]["id"] == "zoomer@2"
    back = vz_ray("roll", "--back", "--log-dir", f"{folder}/logs")
    assert "serving version 3" in back.stdout
    assert back.stdout.split(": ")[1].startswith(str(Path("assets/tiny-base").resolve()))


def test_interrupt_during_startup_prints_a_hint(folder: Path):
    command = [sys.executable, "-m", "vz_ray.cli", "serve", "conf/serve/tiny.yaml", "port=0"]
    process = psutil.Popen(
        [*command, *settings(folder / "stopped")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    end_time = time.monotonic() + START_S
    while not any("raylet" in name_of(children) for children in process.children(recursive=True)):
        assert process.poll() is None
        assert time.monotonic() < end_time
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == (
        "vz-ray: stopped by SIGINT; the server was still starting and has no state; run the same command again"
    )


def name_of(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def test_used_port_fails_at_once(url: str, folder: Path):
    port = url.rpartition(":")[2]
    result = vz_ray("serve", "conf/serve/tiny.yaml", f"port={port}", *settings(folder / "second"))
    assert result.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve"], "set model=PATH"),
        (["serve", "model=assets/tiny-base", "host=0.0.0.0"], "vz-ray keys create"),
        (["serve", "model=assets/tiny-base", "epsiode.max_rounds=3"], "episode"),
        (["ask", "nothing.mp4", "What?"], "file nothing.mp4 does not exist"),
        (["ask", "What?", "--server", "http://127.0.0.1:9"], "http://127.0.0.1:9"),
        (["roll"], "MODEL and --back"),
        (["roll", "assets/tiny-base", "--log-dir", "nowhere"], "start one with `vz-ray serve`"),
    ],
)
def test_user_errors_are_one_line(arguments, message):
    result = vz_ray(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_ask_without_server_starts_an_engine(folder: Path):
    more = [word for setting in settings(folder) for word in ("-s", setting)]
    result = vz_ray("ask", str(folder / "v.mp4"), "What is it?", "-s", "conf/serve/tiny.yaml", *more)
    assert result.returncode == 0, result.stderr
    assert "overview of 6 frames" in result.stdout
    assert "after" in result.stdout
