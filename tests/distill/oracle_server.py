"""An oracle of the needle world behind a real HTTP server that speaks the OpenAI protocol."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.rewards.fake_endpoint import FakeReply
from vz_ray.env.chat_format import ChatFormat
from vz_ray.env.task import Task
from vz_ray.needle.oracle import ZoomOracle

CLOSE = "</video_zoom>"
PROMPT_TOKENS, COMPLETION_TOKENS = 1000, 50
"""What the server says that every request takes."""


def make_completion(text: str | None, stop: str = "stop", usage: bool = True) -> FakeReply:
    """A completion with its usage."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": stop}
    body = {"id": "c", "object": "chat.completion", "created": 0, "model": "oracle", "choices": [choice]}
    if usage:
        body["usage"] = {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": COMPLETION_TOKENS,
            "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS,
        }
    return FakeReply(body=json.dumps(body).encode())


def message_text(message: Mapping[str, Any]) -> str:
    """The text of a message, images left out."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def request_images(body: Mapping[str, Any]) -> list[bytes]:
    """Every image of a request, in order."""
    parts = [part for m in body["messages"] if isinstance(m["content"], list) for part in m["content"]]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [base64.b64decode(url.partition(",")[2]) for url in urls]


def count_turns(body: Mapping[str, Any]) -> int:
    return sum(message["role"] == "assistant" for message in body["messages"])


class OracleServer:
    """A script of `serving`: plays each task along its truth, stopping at `</video_zoom>` as servers do.

    Args:
        tasks: Told apart by their questions.
        wire: Of any kind; the oracle needs one.
        before: Asked first, with the number of the request and its body; what it returns is replied.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        wire: ChatFormat,
        before: Callable[[int, dict[str, Any]], FakeReply | None] = lambda number, body: None,
    ) -> None:
        self._oracles = {task.question: ZoomOracle(task, wire, 8) for task in tasks}
        self._before = before

    def oracle(self, body: Mapping[str, Any]) -> ZoomOracle:
        asked = next(message_text(m) for m in body["messages"] if m["role"] == "user")
        return next(oracle for question, oracle in self._oracles.items() if question in asked)

    def __call__(self, number: int, body: dict[str, Any]) -> FakeReply:
        if (first := self._before(number, body)) is not None:
            return first
        text = self.oracle(body)._turn_text(count_turns(body))
        return make_completion(text.removesuffix(CLOSE) if CLOSE in body.get("stop", ()) else text)
