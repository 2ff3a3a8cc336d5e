"""OpenAI's chat completion response: the complete object, and the chunks of a stream.

Extensions are separate fields that other clients ignore:

    message   `zooms`, `overviews`, `reasoning`, `reasoning_content`
    delta     `overview`, `zooming`, `zoom`, `reasoning`, `reasoning_content`
    response  `vz_ray`

`reasoning` is vLLM's field and `reasoning_content` that of DeepSeek and SGLang; both have the same text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vz_ray.serve.agent_protocol import (
    AgentEvent,
    FrameThumbnail,
    OverviewEvent,
    RequestCompleted,
    TextDelta,
    ZoomFinished,
    ZoomStarted,
)
from vz_ray.serve.client_zoom import TOOL_NAME

Json = dict[str, Any]
SSE_DONE = "data: [DONE]\n\n"


@dataclass(slots=True)
class CompletionBuilder:
    """Builds the response or the stream chunks of one chat completion.

    Attributes:
        id: Id of the completion.
        model: Model name without version.
        created: Unix time, seconds.
        answer_streamed: Text of the answer is already sent, so the last chunk does not repeat it.
    """

    id: str
    model: str
    created: int
    answer_streamed: bool = False

    def completion(self, events: Iterable[AgentEvent], result: RequestCompleted) -> Json:
        """Build the `chat.completion` object."""
        events = list(events)
        message: Json = {"role": "assistant", "content": result.text or None, "refusal": None}
        if result.reasoning:
            message |= _reasoning(result.reasoning)
        if result.tool_call_arguments:
            message |= {"content": None, "tool_calls": [tool_call(self.id, result)]}
        message["zooms"] = [zoom_to_dict(event) for event in events if isinstance(event, ZoomFinished)]
        message["overviews"] = [overview_to_dict(event) for event in events if isinstance(event, OverviewEvent)]
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(result)}
        return {
            **self._header("chat.completion", result.version),
            "choices": [choice],
            "usage": token_usage(result),
            "vz_ray": vz_ray_fields(result),
        }

    def first_chunk(self) -> Json:
        """Build the chunk that opens a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def event_chunk(self, event: OverviewEvent | TextDelta | ZoomStarted | ZoomFinished | RequestCompleted) -> Json:
        """Build the `chat.completion.chunk` of an event; `RequestCompleted` ends the answer."""
        match event:
            case TextDelta(_, text, is_answer):
                self.answer_streamed |= is_answer
                return self._chunk({"content": text} if is_answer else _reasoning(text))
            case OverviewEvent():
                return self._chunk({"overview": overview_to_dict(event)})
            case ZoomStarted(turn, video, segment, fps):
                return self._chunk({"zooming": {"turn": turn, "video": video, "segment": list(segment), "fps": fps}})
            case ZoomFinished():
                return self._chunk({"zoom": zoom_to_dict(event)})
            case RequestCompleted():
                return self._final_chunk(event)

    def _final_chunk(self, result: RequestCompleted) -> Json:
        delta: Json = {} if self.answer_streamed or not result.text else {"content": result.text}
        if result.tool_call_arguments:
            delta = {"tool_calls": [{"index": 0, **tool_call(self.id, result)}]}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason(result)}
        header = self._header("chat.completion.chunk", result.version)
        return {**header, "choices": [choice], "vz_ray": vz_ray_fields(result)}

    def usage_chunk(self, result: RequestCompleted) -> Json:
        """Build the chunk with token counts, for `stream_options.include_usage`."""
        header = self._header("chat.completion.chunk", result.version)
        return {**header, "choices": [], "usage": token_usage(result)}

    def _chunk(self, delta: Json) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        return {**self._header("chat.completion.chunk", None), "choices": [choice]}

    def _header(self, kind: str, version: int | None) -> Json:
        model = self.model if version is None else f"{self.model}@{version}"
        return {"id": self.id, "object": kind, "created": self.created, "model": model}


def format_sse(value: Json, retry_after_s: float | None = None) -> str:
    """Format one server-sent event; `retry_after_s` sets its `retry` field."""
    retry = "" if retry_after_s is None else f"retry: {round(1000 * retry_after_s)}\n"
    return f"{retry}data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def finish_reason(result: RequestCompleted) -> str:
    """Return `tool_calls` before a client's zoom, `length` if tokens or context ran out, else `stop`."""
    if result.tool_call_arguments:
        return "tool_calls"
    return "length" if result.status == "truncated" else "stop"


def tool_call(completion_id: str, result: RequestCompleted) -> Json:
    """Build the tool call of a zoom that the client must execute."""
    call_id = f"call_{completion_id.rpartition('-')[2][:24]}"
    function = {"name": TOOL_NAME, "arguments": result.tool_call_arguments}
    return {"id": call_id, "type": "function", "function": function}


def token_usage(result: RequestCompleted) -> Json:
    """Build OpenAI's `usage` object, with the numbers of frames and zooms added."""
    return {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.completion_tokens,
        "total_tokens": result.prompt_tokens + result.completion_tokens,
        "frames": result.frames,
        "zooms": result.zooms,
    }


def vz_ray_fields(result: RequestCompleted) -> Json:
    """Build the `vz_ray` object of a response."""
    return {
        "status": result.status,
        "answer": result.text,
        "seconds": round(result.seconds, 4),
        "version": result.version,
        "gated": result.gated,
    }


def overview_to_dict(overview: OverviewEvent) -> Json:
    """Build the `overview` object; `pts` are the times of the frames, seconds."""
    return {
        "video": overview.video,
        "duration": round(overview.duration_s, 3),
        **_frames(overview.frames),
    }


def zoom_to_dict(zoom: ZoomFinished) -> Json:
    """Build the `zoom` object; `pts` are the times of the frames in the clip, seconds."""
    return {
        "turn": zoom.turn,
        "video": zoom.video,
        "segment": None if zoom.segment is None else list(zoom.segment),
        "fps": zoom.fps,
        **_frames(zoom.frames),
        "refused": zoom.refused or None,
        "reasoning": zoom.reasoning,
        "latency": {"turn_s": round(zoom.seconds[0], 4), "clip_s": round(zoom.seconds[1], 4)},
    }


def _reasoning(text: str) -> Json:
    return {"reasoning": text, "reasoning_content": text}


def _frames(frames: tuple[FrameThumbnail, ...]) -> Json:
    fields: Json = {"pts": [round(frame.pts_s, 3) for frame in frames]}
    if any(frame.image for frame in frames):
        fields["thumbnails"] = [frame.image for frame in frames]
    return fields
