"""Reply scripts of a teacher endpoint that answers needle tasks with the oracle."""

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
WRONG_ZOOM_TURN = '<think>there</think><video_zoom>{"segment":[0.00,2.00],"fps":2}</video_zoom>'
PROMPT_TOKENS, COMPLETION_TOKENS = 1000, 50
"""Token usage that the server reports for each request."""


def make_completion(text: str | None, finish_reason: str = "stop", usage: bool = True) -> FakeReply:
    """Build a completion reply, optionally with token usage."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    body = {"id": "c", "object": "chat.completion", "created": 0, "model": "oracle", "choices": [choice]}
    if usage:
        body["usage"] = {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": COMPLETION_TOKENS,
            "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS,
        }
    return FakeReply(body=json.dumps(body).encode())


def message_text(message: Mapping[str, Any]) -> str:
    """Return the text of a message without its images."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def request_images(body: Mapping[str, Any]) -> list[bytes]:
    """Return all images of a request, in order."""
    parts = [part for m in body["messages"] if isinstance(m["content"], list) for part in m["content"]]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [base64.b64decode(url.partition(",")[2]) for url in urls]


def count_turns(body: Mapping[str, Any]) -> int:
    return sum(message["role"] == "assistant" for message in body["messages"])


class OracleServer:
    """`ReplyScript` that answers each task with the oracle and honors the stop string `</video_zoom>`.

    Args:
        tasks: Tasks with distinct questions.
        chat_format: Any chat format; the oracle requires one.
        override: Called first with the index and the body of the request; a returned reply is sent instead.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        chat_format: ChatFormat,
        override: Callable[[int, dict[str, Any]], FakeReply | None] = lambda number, body: None,
    ) -> None:
        self._oracles = {task.question: ZoomOracle(task, chat_format, 8) for task in tasks}
        self._override = override

    def oracle(self, body: Mapping[str, Any]) -> ZoomOracle:
        user_text = next(message_text(m) for m in body["messages"] if m["role"] == "user")
        return next(oracle for question, oracle in self._oracles.items() if question in user_text)

    def __call__(self, number: int, body: dict[str, Any]) -> FakeReply:
        if (reply := self._override(number, body)) is not None:
            return reply
        text = self.oracle(body)._turn_text(count_turns(body))
        return make_completion(text.removesuffix(CLOSE) if CLOSE in body.get("stop", ()) else text)


class ContinuationOracleServer(OracleServer):
    """`OracleServer` for the teacher's turns after one prefix turn of the policy."""

    def __call__(self, number: int, body: dict[str, Any]) -> FakeReply:
        return super().__call__(number, _without_first_turn(body))


def _without_first_turn(body: dict[str, Any]) -> dict[str, Any]:
    turns = [message for message in body["messages"] if message["role"] == "assistant"]
    messages = [message for message in body["messages"] if not turns or message is not turns[0]]
    return {**body, "messages": messages}
