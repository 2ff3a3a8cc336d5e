"""Reasoning of a served agent whose chat template opens `<think>`, as clients of vLLM's reasoning parsers expect it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.env.chat_templates import QWEN3_VL_THINKING
from tests.serve.live_server import LiveServer, live_server, tiny_serve_config

pytestmark = pytest.mark.slow

ZOOM = "What is it? {think 3} {zoom 2 4 2} {answer B}"
UNCLOSED = "What is it? {think 3} {quote B}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("reasoning")
    model = shutil.copytree("assets/tiny-base", folder / "model")
    (model / "chat_template.jinja").write_text(QWEN3_VL_THINKING)
    config = tiny_serve_config(folder, **{"model": model, "episode.thinking": "on"})
    with live_server(config, folder) as running:
        yield running


def stream(server: LiveServer, question: str) -> tuple[str, str, Any]:
    """Stream a reply; return its content, its reasoning and the last choice."""
    choices = [chunk.choices[0] for chunk in server.ask(question, stream=True)]
    contents = [choice.delta.content or "" for choice in choices]
    reasoning = [getattr(choice.delta, "reasoning", "") for choice in choices]
    assert reasoning == [getattr(choice.delta, "reasoning_content", "") for choice in choices]
    return "".join(contents), "".join(reasoning), choices[-1]


def test_content_is_the_answer_without_reasoning(server: LiveServer) -> None:
    reply = server.ask(ZOOM)
    message = reply.choices[0].message
    assert (message.content, message.reasoning, message.reasoning_content) == ("B", "see", "see")
    assert [zoom["reasoning"] for zoom in message.zooms] == ["see see see"]
    assert stream(server, ZOOM)[:2] == ("B", "see see seesee")


def test_unclosed_reasoning_has_no_content(server: LiveServer) -> None:
    reply = server.ask(UNCLOSED)
    message = reply.choices[0].message
    assert (message.content, message.reasoning) == (None, "see see see <answer>B</answer>")
    assert (reply.choices[0].finish_reason, reply.vz_ray["status"]) == ("stop", "no_answer")
    content, reasoning, last = stream(server, UNCLOSED)
    assert (content, reasoning, last.finish_reason) == ("", message.reasoning, "stop")


def test_truncated_reasoning_has_no_content(server: LiveServer) -> None:
    reply = server.ask(ZOOM, max_tokens=4)
    assert reply.choices[0].message.content is None
    assert reply.choices[0].message.reasoning.startswith("see")
    assert (reply.choices[0].finish_reason, reply.vz_ray["status"]) == ("length", "truncated")


def test_reply_without_content_continues_the_chat(server: LiveServer) -> None:
    video = {"type": "video_url", "video_url": {"url": str(server.video)}}
    messages: list[Any] = [{"role": "user", "content": [video, {"type": "text", "text": UNCLOSED}]}]
    messages.append(server.ask("", messages=messages).choices[0].message.model_dump())
    messages.append({"role": "user", "content": "Sure? {answer C}"})
    assert server.ask("", messages=messages).choices[0].message.content == "C"
