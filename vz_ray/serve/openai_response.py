"""Replies in OpenAI's form: whole, or in chunks as it happens.

Everything of our own stands beside the standard fields, where plain clients
pass over it: `zooms` and `reasoning_content` in a message, `zoom`, `zooming`,
`overview` and `reasoning_content` in a delta, `vz_ray` at the top.
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
    RequestFailed,
    TextDelta,
    ZoomFinished,
    ZoomStarted,
)
from vz_ray.serve.api_errors import ApiError
from vz_ray.serve.client_zoom import TOOL_NAME

Json = dict[str, Any]
SSE_DONE = "data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class CompletionBuilder:
    """Names one reply.

    Attributes:
        id: Of the completion.
        model: As the client will see it, without its version.
        created: Seconds since 1970.
    """

    id: str
    model: str
    created: int

    def completion(self, told: Iterable[AgentEvent], end: RequestCompleted) -> Json:
        """`chat.completion`."""
        message: Json = {"role": "assistant", "content": end.text, "refusal": None}
        if end.reasoning:
            message["reasoning_content"] = end.reasoning
        if end.tool_call_arguments:
            message |= {"content": None, "tool_calls": [tool_call(self.id, end)]}
        message["zooms"] = [zoom_to_dict(event) for event in told if isinstance(event, ZoomFinished)]
        message["overviews"] = [overview_to_dict(event) for event in told if isinstance(event, OverviewEvent)]
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(end)}
        return {
            **self._head("chat.completion", end.version),
            "choices": [choice],
            "usage_chunk": token_usage(end),
            "vz_ray": vz_ray_fields(end),
        }

    def first_chunk(self) -> Json:
        """The chunk that opens a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def event_chunk(self, event: OverviewEvent | TextDelta | ZoomStarted | ZoomFinished) -> Json:
        """`chat.completion.event_chunk` of something that happened."""
        match event:
            case TextDelta(_, text, answer):
                return self._chunk({"content" if answer else "reasoning_content": text})
            case OverviewEvent():
                return self._chunk({"overview": overview_to_dict(event)})
            case ZoomStarted(turn, video, segment, fps):
                return self._chunk(
                    {"zooming": {"turn": turn, "video": video, "segment": list(segment), "fps": fps}}
                )
            case ZoomFinished():
                return self._chunk({"zoom": zoom_to_dict(event)})

    def final_chunk(self, end: RequestCompleted, *, answer_streamed: bool) -> Json:
        """The chunk that ends the answer; `answer_streamed`: its text has been streamed."""
        head = self._head("chat.completion.chunk", end.version)
        delta: Json = {} if answer_streamed else {"content": end.text}
        if end.tool_call_arguments:
            delta = {"tool_calls": [{"index": 0, **tool_call(self.id, end)}]}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason(end)}
        return {**head, "choices": [choice], "vz_ray": vz_ray_fields(end)}

    def usage_chunk(self, end: RequestCompleted) -> Json:
        """The chunk with token counts, for clients that asked for one."""
        return {
            **self._head("chat.completion.chunk", end.version),
            "choices": [],
            "usage_chunk": token_usage(end),
        }

    def _chunk(self, delta: Json) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        return {**self._head("chat.completion.chunk", None), "choices": [choice]}

    def _head(self, kind: str, version: int | None) -> Json:
        model = self.model if version is None else f"{self.model}@{version}"
        return {"id": self.id, "object": kind, "created": self.created, "model": model}


def format_sse(value: Json, retry_s: float | None = None) -> str:
    """One server-sent event; `retry_s` is after how long the client may ask again, where it is refused."""
    retry = "" if retry_s is None else f"retry: {round(1000 * retry_s)}\n"
    return f"{retry}data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def finish_reason(end: RequestCompleted) -> str:
    """`tool_calls` where the client is to zoom, `length` where tokens or room ran out, else `stop`."""
    if end.tool_call_arguments:
        return "tool_calls"
    return "length" if end.status == "truncated" else "stop"


def tool_call(id: str, end: RequestCompleted) -> Json:
    """A zoom for the client to carry out."""
    name = f"call_{id.rpartition('-')[2][:24]}"
    return {
        "id": name,
        "type": "function",
        "function": {"name": TOOL_NAME, "arguments": end.tool_call_arguments},
    }


def token_usage(end: RequestCompleted) -> Json:
    """Tokens as OpenAI counts them, and frames and zooms."""
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": end.prompt_tokens + end.completion_tokens,
        "frames": end.frames,
        "zooms": end.zooms,
    }


def vz_ray_fields(end: RequestCompleted) -> Json:
    """How the answer came about."""
    return {
        "status": end.status,
        "answer": end.text,
        "seconds": round(end.seconds, 4),
        "version": end.version,
        "gated": end.gated,
    }


def overview_to_dict(overview: OverviewEvent) -> Json:
    return {
        "video": overview.video,
        "duration": round(overview.duration_s, 3),
        **_frames(overview.frames),
    }


def zoom_to_dict(zoom: ZoomFinished) -> Json:
    """A zoom as clients see it: `pts` are the times of the frames that were shown, seconds."""
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


def _frames(frames: tuple[FrameThumbnail, ...]) -> Json:
    found: Json = {"pts": [round(frame.pts_s, 3) for frame in frames]}
    if any(frame.image for frame in frames):
        found["thumbnails"] = [frame.image for frame in frames]
    return found


def to_api_error(failed: RequestFailed) -> ApiError:
    """The error that a client gets in place of an answer."""
    return ApiError(failed.http_status, failed.message, code=failed.code)
