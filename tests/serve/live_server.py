"""A complete server: Ray Serve, the real engine and decoders, on a free port."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from benchmarks.directive_agent import DirectiveAgent
from tests.video.sample_videos import VideoSpec, write_video
from vz_ray.config import load_config
from vz_ray.config.serve import ServeConfig
from vz_ray.serve.app import AgentReplica
from vz_ray.serve.launch import ServerState, running_server

START_S = 300.0


@dataclass
class LiveServer:
    """A running server.

    Attributes:
        state: Address and weights.
        config: Configuration of the server.
        folder: Directory of logs and uploads.
        video: Video of 12 s in an allowed directory.
    """

    state: ServerState
    config: ServeConfig
    folder: Path
    video: Path

    @property
    def url(self) -> str:
        return self.state.url

    def client(self, key: str = "none", **more: Any) -> openai.OpenAI:
        """Return an OpenAI client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120, **more)

    def ask(self, question: str, *, client: openai.OpenAI | None = None, **more: Any) -> Any:
        """Request a chat completion about the video."""
        parts: list[Any] = [{"type": "video_url", "video_url": {"url": str(self.video)}}]
        parts.append({"type": "text", "text": question})
        defaults: dict[str, Any] = {"model": "zoomer", "messages": [{"role": "user", "content": parts}]}
        return (client or self.client()).chat.completions.create(**{**defaults, **more})


def tiny_serve_config(folder: Path, **more: Any) -> ServeConfig:
    """Return the config of the tiny agent with all its files below `folder`."""
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
    """Serve in a background thread."""
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    video = write_video(folder / "videos", VideoSpec("v.mp4", frames=300))
    loop, ready, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    results: list[ServerState | BaseException] = []

    async def serve() -> None:
        try:
            async with running_server(config, agent_type) as serving:
                results.append(serving)
                ready.set()
                await stop.wait()
        except BaseException as error:
            results.append(error)
            ready.set()
            raise

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert ready.wait(START_S), "the server did not start"
    if isinstance(results[0], BaseException):
        raise results[0]
    try:
        yield LiveServer(results[0], config, folder, video)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)
