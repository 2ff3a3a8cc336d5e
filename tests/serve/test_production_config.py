"""`serve run conf/serve/production.yaml` on a local Ray cluster, with a tiny model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from tests.serve.test_launch import vz_ray
from tests.video.sample_videos import VideoSpec, write_video
from vz_ray.utils.ports import find_free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

START_S = 300.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Ray head node that is started for this test."""
    folder, port = tmp_path_factory.mktemp("ray"), find_free_port()
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--include-dashboard=true",
        f"--port={port}", f"--temp-dir={folder}", "--num-cpus=4", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={find_free_port()}", f"--dashboard-agent-listen-port={find_free_port()}",
        f"--ray-client-server-port={find_free_port()}", "--disable-usage-stats",
    ]  # fmt: skip
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(60)


def adapted(folder: Path, key_file: Path) -> tuple[Path, str]:
    """Return the production config with local paths, and the server's address."""
    content: dict[str, Any] = yaml.safe_load(Path("conf/serve/production.yaml").read_text())
    content["http_options"] = {"host": "127.0.0.1", "port": find_free_port()}
    application = content["applications"][0]
    assert set(application["args"]) == {"config", "access.keys_file", "files.directory"}
    model = str(Path("assets/tiny-base").resolve())
    application["args"] |= {
        "config": "conf/serve/tiny.yaml",
        "access.keys_file": str(key_file),
        "files.directory": str(folder / "uploads"),
        "files.allowed_dirs": f"[{folder}]",
        "engine.kv_cache_gib": 0.25,
    }
    application["deployments"][0]["user_config"]["model"] = model
    path = folder / "production.yaml"
    path.write_text(yaml.safe_dump(content))
    return path, f"http://127.0.0.1:{content['http_options']['port']}"


def test_production_config_serves_and_updates_weights(cluster: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    created = vz_ray("keys", "create", "tester", "--file", str(keys))
    key = created.stdout.strip()
    path, url = adapted(tmp_path, keys)
    video = write_video(tmp_path, VideoSpec("v.mp4", frames=120))
    deploy(cluster, path)
    wait_for(lambda: httpx.get(f"{url}/ready").status_code == 200, "the server")
    assert httpx.get(f"{url}/v1/models").status_code == 401
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120)
    content = [
        {"type": "video_url", "video_url": {"url": str(video)}},
        {"type": "text", "text": "What is it?"},
    ]
    body: Any = {"model": "zoomer", "messages": [{"role": "user", "content": content}]}
    assert client.chat.completions.create(**body).usage.frames > 0
    assert versions(client) == [1]
    again = yaml.safe_load(path.read_text())
    again["applications"][0]["deployments"][0]["user_config"]["version"] = 2
    path.write_text(yaml.safe_dump(again))
    deploy(cluster, path)
    wait_for(lambda: versions(client) == [2], "the second version")
    assert client.chat.completions.create(**body).usage.frames > 0


def deploy(cluster: str, path: Path) -> None:
    command = [str(Path(sys.executable).with_name("serve")), "run", "--non-blocking", "--address", cluster]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    result = subprocess.run(
        [*command, str(path)], capture_output=True, text=True, timeout=START_S, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]


def versions(client: openai.OpenAI) -> list[int]:
    """Return the served model names with a version."""
    names = [model.id for model in client.models.list().data]
    return sorted(int(name.split("@")[1]) for name in names if "@" in name)


def wait_for(condition: Any, description: str) -> None:
    end_time = time.monotonic() + START_S
    while time.monotonic() < end_time:
        try:
            if condition():
                return
        except (httpx.TransportError, openai.APIError):
            pass
        time.sleep(1)
    raise AssertionError(f"{description} did not come within {START_S:.0f} s")
