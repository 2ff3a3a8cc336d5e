"""Ask one question in the terminal (`vz-ray ask`), of a running server or of an engine started for it.

Both sources yield chunks of a streamed chat completion.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from vz_ray.config.serve import ServeConfig
from vz_ray.env.task import AnswerType, Task
from vz_ray.env.trajectory import SamplingParams
from vz_ray.monitoring import logging_config
from vz_ray.runtime import ray_cluster, runtime
from vz_ray.serve.agent import Agent
from vz_ray.serve.agent_protocol import AgentRequest, RequestFailed
from vz_ray.serve.chat_response import CompletionBuilder
from vz_ray.serve.launch import resolve_checkpoint
from vz_ray.utils.durations import format_duration
from vz_ray.utils.errors import UserError
from vz_ray.utils.interrupt import Interrupt
from vz_ray.video.errors import VideoError
from vz_ray.video.video_file import VideoLimits, is_url, open_video, require_files

Json = dict[str, Any]


def run_ask(config: ServeConfig, videos: Sequence[str], question: str, *, server: str = "", key_env: str = "") -> None:
    """Print the agent's reasoning, its zooms and its answer.

    Args:
        config: Configuration of the engine, if `server` is empty.
        videos: Files or URLs.
        question: The question, including its options.
        server: Address of a running server; empty starts an engine in this process.
        key_env: Environment variable with an API key of the server.

    Raises:
        UserError: A file, the model or the server is missing, or the server rejects the request.
    """
    require_files(videos)
    for video in videos:
        _check_video(video)
    if not server and not config.model:
        raise UserError("model is empty; set -s model=PATH for a local engine, or --server URL for a running server")
    with Interrupt(resume_hint="the question was not answered; run the same command again") as interrupt:
        chunks = (
            _ask_server(server, key_env, config.name, videos, question)
            if server
            else _ask_engine(config, videos, question)
        )
        asyncio.run(interrupt.run_interruptible(_print_chunks(chunks, Console(highlight=False))))


def _check_video(video: str) -> None:
    """Open a local video, because the engine takes minutes to start.

    Raises:
        UserError: The file is not a video; names it.
    """
    if is_url(video):
        return
    try:
        open_video(video, VideoLimits())[0].close()
    except VideoError as error:
        raise UserError(f"{error}; give a video file") from error


async def _ask_engine(config: ServeConfig, videos: Sequence[str], question: str) -> AsyncGenerator[Json]:
    resolve_checkpoint(config.model)
    logging_config.configure_logging(Path(config.log_dir), identity=runtime.run_identity(config))
    # The user of this process may open any file.
    config = replace(config, clips=replace(config.clips, allowed_dirs=[]))
    async with ray_cluster.ray_cluster(config.ray):
        agent = Agent(config)
        try:
            await agent.reconfigure({"model": config.model, "version": 1})
            builder = CompletionBuilder(uuid.uuid4().hex, config.name, int(time.time()))
            async with aclosing(agent.stream(_build_request(config, videos, question))) as stream:
                async for batch in stream:
                    for event in batch:
                        if isinstance(event, RequestFailed):
                            raise UserError(event.message)
                        yield builder.event_chunk(event)
        finally:
            await agent.shutdown()


def _build_request(config: ServeConfig, videos: Sequence[str], question: str) -> AgentRequest:
    task = Task(
        "ask",
        videos[0] if videos else "",
        question,
        "",
        AnswerType.MULTIPLE_CHOICE,
        extra_videos=tuple(videos[1:]),
    )
    sampling = SamplingParams(temperature=config.temperature, max_tokens=config.episode.max_context)
    return AgentRequest("ask", task, sampling)


async def _ask_server(
    server: str, key_env: str, model: str, videos: Sequence[str], question: str
) -> AsyncGenerator[Json]:
    import openai

    key = os.environ.get(key_env, "") if key_env else "none"
    if not key:
        raise UserError(f"{key_env} is not set; set it to an API key of {server}")
    async with openai.AsyncOpenAI(base_url=f"{server.rstrip('/')}/v1", api_key=key) as client:
        upload_ids: list[str] = []
        try:
            parts: list[Any] = [await _video_part(client, video, upload_ids) for video in videos]
            parts.append({"type": "text", "text": question})
            chunks = await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": parts}], stream=True
            )
            async for chunk in chunks:
                yield chunk.model_dump()
        except openai.APIStatusError as error:
            raise UserError(f"{server} rejected the request: {error.message}") from error
        except openai.APIError as error:
            raise UserError(f"{server}: {error.message}") from error
        finally:
            for upload_id in upload_ids:
                await client.files.delete(upload_id)


async def _video_part(client: Any, video: str, upload_ids: list[str]) -> Json:
    """Return the message part of a video. A file is uploaded and its id appended to `upload_ids`."""
    if is_url(video):
        return {"type": "video_url", "video_url": {"url": video}}
    upload = await client.files.create(file=Path(video), purpose="user_data")
    upload_ids.append(upload.id)
    return {"type": "file", "file": {"file_id": upload.id}}


async def _print_chunks(chunks: AsyncGenerator[Json], console: Console) -> None:
    reasoning = False  # whether the output ends with reasoning, which has no line break
    async with aclosing(chunks) as stream:
        async for chunk in stream:
            for choice in chunk["choices"]:
                delta = choice["delta"]
                if reasoning and delta.get("content"):
                    console.print()
                _print_delta(delta, console)
                if delta.get("reasoning_content") or delta.get("content"):
                    reasoning = not delta.get("content")
                elif delta.get("zoom"):
                    reasoning = False
            if (result := chunk.get("vz_ray")) is not None:
                status = result["status"].replace("_", " ")
                console.print(f"\n[dim]{status} after {result['seconds']:.1f} s[/]")


def _print_delta(delta: Json, console: Console) -> None:
    if overview := delta.get("overview"):
        num_frames, video = len(overview["pts"]), overview["video"] + 1
        duration = format_duration(overview["duration"])
        console.print(f"[dim]video {video}: {duration}, overview of {num_frames} frames[/]")
    if text := delta.get("reasoning_content"):
        console.print(Text(text, style="dim"), end="")
    if zoom := delta.get("zoom"):
        console.print(_format_zoom(zoom))
    if text := delta.get("content"):
        console.print(Text(text, style="bold green"), end="")


def _format_zoom(zoom: Json) -> str:
    segment = ""
    if zoom["segment"]:
        start, end = zoom["segment"]
        segment = f"{start:.2f} to {end:.2f} s at {zoom['fps']:g} fps"
    if zoom["refused"]:
        prefix = f"{segment}, " if segment else ""
        return f"\n[yellow]zoom {zoom['turn'] + 1}  {prefix}refused: {escape(zoom['refused'])}[/]"
    return f"\n[cyan]zoom {zoom['turn'] + 1}  {segment}, {len(zoom['pts'])} frames[/]"
