"""A server that runs: Ray Serve, the real engine, the real decoders, on a port of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from benchmarks.directive_agent import DirectiveAgent
from tests.video.sample_videos import VideoSpec, write_video
from vz_ray.config import load_config
from vz_ray.config.serve import ServeConfig
from vz_ray.serve.app import AgentReplica
from vz_ray.serve.launch import ServerState, running_server

START_S = 300.0


@dataclass
class LiveServer:
    """A server, and what its tests need.

    Attributes:
        folder: With its logs and uploads.
        video: Twelve seconds, inside of the server's roots.
    """

    state: ServerState
    config: ServeConfig
    folder: Path
    video: Path

    @property
    def url(self) -> str:
        return self.state.url

    def client(self, key: str = "none", **more: Any) -> openai.OpenAI:
        """OpenAI's own, which knows nothing of zooms."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120, **more)

    def ask(self, question: str, *, client: openai.OpenAI | None = None, **more: Any) -> Any:
        """A chat completion about the video."""
        parts: list[Any] = [{"type": "video_url", "video_url": {"url": str(self.video)}}]
        parts.append({"type": "text", "text": question})
        asked: dict[str, Any] = {"model": "zoomer", "messages": [{"role": "user", "content": parts}]}
        return (client or self.client()).chat.completions.create(**{**asked, **more})


def tiny_serve_config(folder: Path, **more: Any) -> ServeConfig:
    """The tiny agent, with everything that it keeps below `folder`."""
    overrides = [
        "model=assets/tiny-base",
        "port=0",
        f"log_dir={folder}/logs",
        f"files.directory={folder}/uploads",
        f"files.allowed_dirs=[{folder}/videos]",
        "clips.disk_cache_gib=0",
        f"clips.disk_cache_dir={folder}/cache",
        "engine.kv_cache_gib=0.25",
        "access.max_requests_per_key=64",
        *(f"{key}={value}" for key, value in more.items()),
    ]
    return load_config(ServeConfig, "conf/serve/tiny.yaml", overrides)


@contextmanager
def live_server(
    config: ServeConfig, folder: Path, agent_type: type[AgentReplica] = DirectiveAgent
) -> Iterator[LiveServer]:
    """Serves from a thread of its own, as `vz-ray serve` does from its main one."""
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    video = write_video(folder / "videos", VideoSpec("v.mp4", frames=300))
    loop, began, over = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    found: list[ServerState | BaseException] = []

    async def serve() -> None:
        try:
            async with running_server(config, agent_type) as serving:
                found.append(serving)
                began.set()
                await over.wait()
        except BaseException as error:
            found.append(error)
            began.set()
            raise

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert began.wait(START_S), "the server did not start"
    if isinstance(found[0], BaseException):
        raise found[0]
    try:
        yield LiveServer(found[0], config, folder, video)
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(60)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """For this machine alone, without keys, with limits on bodies that a test can reach."""
    folder = tmp_path_factory.mktemp("serve")
    limits = {"max_json_mib": 16, "max_upload_gib": 0.02, "grace_s": 3, "min_kib_per_s": 50}
    with live_server(
        tiny_serve_config(folder, **{f"access.{name}": value for name, value in limits.items()}), folder
    ) as found:
        yield found
