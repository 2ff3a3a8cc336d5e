"""Parsing of a chat completion request without a server: earlier replies that clients send back."""

from __future__ import annotations

from typing import Any

import pytest

from vz_ray.config.serve import ServeConfig
from vz_ray.serve.api_errors import ApiError
from vz_ray.serve.chat_request import ChatMessage, Conversation, parse_conversation


def parse(*messages: dict[str, Any]) -> Conversation:
    return parse_conversation([ChatMessage.model_validate(message) for message in messages], ServeConfig())


def test_reply_without_content_is_an_empty_answer() -> None:
    reply = {"role": "assistant", "content": None, "reasoning": "so"}
    conversation = parse({"role": "user", "content": "q"}, reply, {"role": "user", "content": "sure?"})
    assert (conversation.question, conversation.history) == ("sure?", [("q", "")])
    with pytest.raises(ApiError, match="a message needs content"):
        parse({"role": "user", "content": None})


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_of_a_tool_call_is_kept(name: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "video_zoom", "arguments": "{}"}}
    reply = {"role": "assistant", "tool_calls": [call], name: "so"}
    conversation = parse({"role": "user", "content": "q"}, reply, {"role": "tool", "content": "go on"})
    assert [exchange.reasoning for exchange in conversation.tool_exchanges] == ["so"]
