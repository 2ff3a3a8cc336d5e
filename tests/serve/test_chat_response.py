"""Chat completions and stream chunks without a server: content and reasoning."""

from __future__ import annotations

from typing import Any

from vz_ray.serve.agent_protocol import RequestCompleted, TextDelta
from vz_ray.serve.chat_response import CompletionBuilder


def completed(text: str, reasoning: str, status: str = "no_answer") -> RequestCompleted:
    return RequestCompleted(text, reasoning, status, 1, 10, 5, 0, 0, 1.0)


def builder() -> CompletionBuilder:
    return CompletionBuilder("chatcmpl-1", "zoomer", 0)


def delta(chunk: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = chunk["choices"][0]["delta"]
    return result


def test_reasoning_has_the_names_of_vllm_and_deepseek() -> None:
    message = builder().completion([], completed("B", "so", "answered"))["choices"][0]["message"]
    assert (message["content"], message["reasoning"], message["reasoning_content"]) == ("B", "so", "so")
    assert delta(builder().event_chunk(TextDelta(0, "so", False))) == {"reasoning": "so", "reasoning_content": "so"}
    assert delta(builder().event_chunk(TextDelta(0, "B", True))) == {"content": "B"}


def test_reply_without_text_has_null_content() -> None:
    choice = builder().completion([], completed("", "so"))["choices"][0]
    assert (choice["message"]["content"], choice["message"]["reasoning"]) == (None, "so")
    assert choice["finish_reason"] == "stop"


def test_last_chunk_has_the_text_that_was_not_streamed() -> None:
    assert delta(builder().event_chunk(completed("", "so", "truncated"))) == {}
    assert delta(builder().event_chunk(completed("words", "so"))) == {"content": "words"}
    streamed = builder()
    streamed.event_chunk(TextDelta(0, "B", True))
    assert delta(streamed.event_chunk(completed("B", "so", "answered"))) == {}
