"""`vz-ray ask`: one question in the terminal, of a server that runs or of an engine started for it.

Both tell what happens in the same chunks, those of a streamed chat completion.
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
from vz_ray.runtime import runtime
from vz_ray.serve.agent import Agent
from vz_ray.serve.agent_protocol import AgentRequest, RequestCompleted, RequestFailed, TextDelta
from vz_ray.serve.launch import resolve_checkpoint
from vz_ray.serve.openai_response import CompletionBuilder
from vz_ray.utils.durations import format_duration
from vz_ray.utils.errors import UserError
from vz_ray.utils.interrupt import Interrupt
from vz_ray.video.video_file import is_url

Json = dict[str, Any]


def run_ask(
    config: ServeConfig, videos: Sequence[str], question: str, *, server: str = "", key_env: str = ""
) -> None:
    """Prints what the agent looks at, what it thinks of it, and what it answers.

    Args:
        config: Of the engine, where there is no server.
        videos: Files or URLs.
        question: Options included.
        server: Address of a server that runs; empty starts an engine here.
        key_env: Environment variable with the server's key.

    Raises:
        UserError: There is no such model or server, or it refuses the question.
    """
    for video in videos:
        if not is_url(video) and not Path(video).is_file():
            raise UserError(f"there is no file {video}")
    with Interrupt(resume_hint="the question has no answer; the same command asks it again") as interrupt:
        chunks = (
            _of_server(server, key_env, config.name, videos, question)
            if server
            else _of_engine(config, videos, question)
        )
        asyncio.run(interrupt.run_interruptible(_show(chunks, Console(highlight=False))))


async def _of_engine(config: ServeConfig, videos: Sequence[str], question: str) -> AsyncGenerator[Json]:
    resolve_checkpoint(config.model)
    logging_config.configure_logging(Path(config.log_dir), identity=runtime.run_identity(config))
    # Whoever asks here may read what it asks about.
    config = replace(config, clips=replace(config.clips, allowed_dirs=[]))
    async with runtime.ray_cluster(config.ray):
        agent = Agent(config)
        try:
            await agent.reconfigure({"model": config.model, "version": 1})
            reply = CompletionBuilder(uuid.uuid4().hex, config.name, int(time.time()))
            said = False
            async with aclosing(agent.stream(_question(config, videos, question))) as stream:
                async for batch in stream:
                    for event in batch:
                        if isinstance(event, RequestFailed):
                            raise UserError(event.message)
                        said |= isinstance(event, TextDelta) and event.is_answer
                        if isinstance(event, RequestCompleted):
                            yield reply.final_chunk(event, answer_streamed=said)
                        else:
                            yield reply.event_chunk(event)
        finally:
            await agent.shutdown()


def _question(config: ServeConfig, videos: Sequence[str], question: str) -> AgentRequest:
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


async def _of_server(
    server: str, key_env: str, model: str, videos: Sequence[str], question: str
) -> AsyncGenerator[Json]:
    import openai

    key = os.environ.get(key_env, "") if key_env else "none"
    if not key:
        raise UserError(f"{key_env} is not set; it should hold a key of {server}")
    async with openai.AsyncOpenAI(base_url=f"{server.rstrip('/')}/v1", api_key=key) as client:
        uploads: list[str] = []
        try:
            parts: list[Any] = [await _part(client, video, uploads) for video in videos]
            parts.append({"type": "text", "text": question})
            chunks = await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": parts}], stream=True
            )
            async for chunk in chunks:
                yield chunk.model_dump()
        except openai.APIStatusError as error:
            raise UserError(f"{server} refuses: {error.message}") from error
        except openai.APIError as error:
            raise UserError(f"{server}: {error.message}") from error
        finally:
            for id in uploads:
                await client.files.delete(id)


async def _part(client: Any, video: str, uploads: list[str]) -> Json:
    """The part of a message that shows a video; a file is uploaded, to be deleted afterwards."""
    if is_url(video):
        return {"type": "video_url", "video_url": {"url": video}}
    stored = await client.files.create(file=Path(video), purpose="user_data")
    uploads.append(stored.id)
    return {"type": "file", "file": {"file_id": stored.id}}


async def _show(chunks: AsyncGenerator[Json], console: Console) -> None:
    async with aclosing(chunks) as stream:
        async for chunk in stream:
            for choice in chunk["choices"]:
                _show_delta(choice["delta"], console)
            if (facts := chunk.get("vz_ray")) is not None:
                _show_end(facts, console)


def _show_delta(delta: Json, console: Console) -> None:
    if overview := delta.get("overview"):
        shown, video = len(overview["pts"]), overview["video"] + 1
        console.print(
            f"[dim]video {video}: {format_duration(overview['duration'])}, {shown} frames of it shown[/]"
        )
    if text := delta.get("reasoning_content"):
        console.print(Text(text, style="dim"), end="")
    if zoom := delta.get("zoom"):
        console.print(_zoom_line(zoom))
    if text := delta.get("content"):
        console.print(Text(text, style="bold green"), end="")


def _zoom_line(zoom: Json) -> str:
    where = ""
    if zoom["segment"]:
        start, end = zoom["segment"]
        where = f"{start:.2f} to {end:.2f} s at {zoom['fps']:g} fps"
    if zoom["refused"]:
        asked = f"{where}, " if where else ""
        return f"\n[yellow]zoom {zoom['turn'] + 1}  {asked}refused: {escape(zoom['refused'])}[/]"
    return f"\n[cyan]zoom {zoom['turn'] + 1}  {where}, {len(zoom['pts'])} frames[/]"


def _show_end(facts: Json, console: Console) -> None:
    console.print(f"\n[dim]{facts['status'].replace('_', ' ')} after {facts['seconds']:.1f} s[/]")
