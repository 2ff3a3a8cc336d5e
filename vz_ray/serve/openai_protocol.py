"""OpenAI's chat completion protocol: parse requests, build responses and stream chunks.

Fields have OpenAI's names and meaning (`POST /v1/chat/completions`). `video_url` parts follow vLLM.
Extensions are separate fields that other clients ignore:

    request   `vz_ray`, and `pts` of an image part in a tool message
    message   `zooms`, `overviews`, `reasoning_content`
    delta     `overview`, `zooming`, `zoom`, `reasoning_content`
    response  `vz_ray`
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vz_ray.config.serve import ServeConfig
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
from vz_ray.serve.api_errors import ApiError, invalid_request, validation_error
from vz_ray.serve.client_zoom import TOOL_NAME

Json = dict[str, Any]
SSE_DONE = "data: [DONE]\n\n"

# -- request ----------------------------------------------------------------------


class StrictModel(BaseModel):
    """Model that rejects unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True)


class MediaUrl(StrictModel):
    url: str
    detail: str | None = None


class FileReference(StrictModel):
    file_id: str


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


class VideoPart(StrictModel):
    type: Literal["video_url"]
    video_url: MediaUrl


class ImagePart(StrictModel):
    """Image of a message.

    Attributes:
        pts: Extension: time of a frame in a tool message, seconds.
    """

    type: Literal["image_url"]
    image_url: MediaUrl
    pts: float | None = None


class FilePart(StrictModel):
    type: Literal["file"]
    file: FileReference


ContentPart = Annotated[TextPart | VideoPart | ImagePart | FilePart, Field(discriminator="type")]


class FunctionCall(StrictModel):
    name: Literal["video_zoom"]
    arguments: str


class ToolCall(StrictModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(BaseModel):
    """One message. Unknown fields are ignored, because clients send earlier responses back unchanged."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=1)] | None = None


class FunctionSpec(BaseModel):
    """The function of a tool. Description and parameters are ignored: the agent uses its trained ones."""

    name: Literal["video_zoom"]


class ToolSpec(BaseModel):
    type: Literal["function"]
    function: FunctionSpec


class VzRayOptions(StrictModel):
    """Extensions of the request.

    Attributes:
        max_zooms: Maximum number of zooms, up to the agent's own limit; 0 answers from the overview.
        thumbnails: Longest side of returned frame thumbnails, pixels; 0 returns none.
    """

    max_zooms: Annotated[int, Field(ge=0)] | None = None
    thumbnails: Annotated[int, Field(ge=0, le=1024)] = 0


class StreamOptions(StrictModel):
    include_usage: bool = False


class ChatCompletionRequest(StrictModel):
    """Body of a request. Fields without support are accepted with their default value only."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    n: Literal[1] | None = None
    stop: None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: Annotated[list[ToolSpec], Field(max_length=1)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    vz_ray: VzRayOptions = VzRayOptions()

    @property
    def include_usage(self) -> bool:
        """True if a stream must end with token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def client_side_zooms(self) -> bool:
        """True if zooms are returned as tool calls instead of being executed by the server."""
        return bool(self.tools) and self.tool_choice != "none"


class MediaReference(BaseModel):
    """A video or image of a request before it is resolved.

    Attributes:
        kind: `video`, `image`, or `file` for an upload of either kind.
        url: URL, `data:` URI, path on the server, or id of an upload.
        param: Path of the field in the request, for error messages.
        pts: Time of a frame in a tool message, seconds.
    """

    kind: Literal["video", "image", "file"]
    url: str
    param: str
    pts: float | None = None


class ToolExchange(BaseModel):
    """A zoom that was returned as a tool call, and the client's reply.

    Attributes:
        arguments: Arguments of the call, JSON.
        reasoning: Text of the turn before the call.
        frames: The client's frames; empty lets the server decode the clip.
    """

    arguments: str
    reasoning: str
    frames: list[MediaReference] = []


class Conversation(BaseModel):
    """Content of a request.

    Attributes:
        question: The last user message.
        system: All system messages.
        history: Earlier pairs of question and answer.
        media: Videos and images in order of appearance.
        tool_exchanges: Tool calls since the question, each with its reply.
    """

    question: str
    system: str
    history: list[tuple[str, str]]
    media: list[MediaReference]
    tool_exchanges: list[ToolExchange]


def parse_request(body: bytes) -> ChatCompletionRequest:
    """Parse and validate a request body.

    Raises:
        ApiError: The body is not JSON, or a field is unknown or invalid.
    """
    try:
        return ChatCompletionRequest.model_validate_json(body)
    except ValidationError as error:
        details = [_without_union_tags(detail) for detail in error.errors(include_url=False)]
        raise validation_error(details) from None


_UNION_TAGS = frozenset({"str", "list[tagged-union]", "text", "video_url", "image_url", "file"})


def _without_union_tags(detail: Any) -> dict[str, Any]:
    """Remove pydantic's union tags from the location of an error; the request does not contain them."""
    location = list(detail["loc"])
    kept = [
        part
        for k, part in enumerate(location)
        if not (part in _UNION_TAGS and k and (location[k - 1] == "content" or isinstance(location[k - 1], int)))
    ]
    return {**detail, "loc": tuple(kept)}


def parse_model_name(model: str, served_name: str) -> int | None:
    """Return the weight version in a model name; None if the name has no version.

    Example: 3 for `zoomer@3`, None for `zoomer`.

    Raises:
        ApiError: 404, the model does not exist.
    """
    base, separator, version = model.partition("@")
    if base != served_name or (separator and not version.isdigit()):
        raise invalid_request(f"model {model!r} does not exist; use {served_name!r}", "model", "model_not_found", 404)
    return int(version) if separator else None


def parse_conversation(messages: list[ChatMessage], config: ServeConfig) -> Conversation:
    """Extract question, history and media from the messages.

    Raises:
        ApiError: There are too many messages, media or characters, or the order of roles is invalid.
    """
    if len(messages) > config.max_messages:
        raise invalid_request(f"{len(messages)} messages; the maximum is {config.max_messages}", param="messages")
    media: list[MediaReference] = []
    system: list[str] = []
    dialogue: list[tuple[str, str]] = []
    exchanges: list[ToolExchange] = []
    for index, message in enumerate(messages):
        if message.tool_calls or message.role == "tool":
            follows_call = bool(index) and bool(messages[index - 1].tool_calls)
            _add_exchange(exchanges, message, index, follows_call=follows_call)
            continue
        text = _message_text(message, f"messages.{index}", media)
        # Clips of earlier answers are not part of the new prompt.
        exchanges = []
        if message.role in ("system", "developer"):
            system.append(text)
        elif dialogue and dialogue[-1][0] == message.role:
            dialogue[-1] = (message.role, f"{dialogue[-1][1]}\n{text}")
        else:
            dialogue.append((message.role, text))
    num_chars = sum(len(text) for text in system) + sum(len(text) for _, text in dialogue)
    if num_chars > config.max_text_chars:
        raise invalid_request(
            f"{num_chars} characters of text; the maximum is {config.max_text_chars}", param="messages"
        )
    if not dialogue or dialogue[-1][0] != "user":
        raise invalid_request("the last message must have the role `user`", param="messages")
    if dialogue[0][0] != "user":
        raise invalid_request("the first message after `system` must have the role `user`", param="messages")
    _check_count(media, "video", config.max_videos)
    _check_count(media, "image", config.max_images)
    if messages[-1].tool_calls:
        raise invalid_request("the last tool call has no tool message", param=f"messages.{len(messages) - 1}")
    return Conversation(
        question=dialogue[-1][1],
        system="\n".join(system),
        history=[(dialogue[k][1], dialogue[k + 1][1]) for k in range(0, len(dialogue) - 1, 2)],
        media=media,
        tool_exchanges=exchanges,
    )


def _add_exchange(exchanges: list[ToolExchange], message: ChatMessage, index: int, *, follows_call: bool) -> None:
    """Add a tool call, or the tool message that replies to the last one."""
    if message.tool_calls:
        call = message.tool_calls[0].function
        exchanges.append(ToolExchange(arguments=call.arguments, reasoning=message.reasoning_content or ""))
        return
    if not follows_call:
        raise invalid_request("a tool message must follow its tool call", param=f"messages.{index}")
    frames = [part for part in message.content or [] if isinstance(part, ImagePart)]
    for k, part in enumerate(frames):
        param = f"messages.{index}.content.{k}"
        if part.pts is None:
            raise invalid_request("a frame needs its time: `pts`, seconds", param=f"{param}.pts")
        exchanges[-1].frames.append(MediaReference(kind="image", url=part.image_url.url, param=param, pts=part.pts))


def _message_text(message: ChatMessage, path: str, media: list[MediaReference]) -> str:
    """Return the text of a message and append its videos and images to `media`."""
    if message.content is None:
        raise invalid_request("a message needs content", param=f"{path}.content")
    if isinstance(message.content, str):
        return message.content
    texts = []
    for index, part in enumerate(message.content):
        param = f"{path}.content.{index}"
        if isinstance(part, TextPart):
            texts.append(part.text)
            continue
        if message.role != "user":
            raise invalid_request(f"a message with the role `{message.role}` can hold text only", param=param)
        if isinstance(part, VideoPart):
            media.append(MediaReference(kind="video", url=part.video_url.url, param=f"{param}.video_url.url"))
        elif isinstance(part, ImagePart):
            media.append(MediaReference(kind="image", url=part.image_url.url, param=f"{param}.image_url.url"))
        else:
            media.append(MediaReference(kind="file", url=part.file.file_id, param=f"{param}.file.file_id"))
    return "\n".join(texts)


def _check_count(media: list[MediaReference], kind: str, maximum: int) -> None:
    count = sum(reference.kind == kind for reference in media)
    if count > maximum:
        raise invalid_request(f"{count} {kind}s; the maximum is {maximum}", param="messages")


# -- response ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CompletionBuilder:
    """Builds the response or the stream chunks of one chat completion.

    Attributes:
        id: Id of the completion.
        model: Model name without version.
        created: Unix time, seconds.
    """

    id: str
    model: str
    created: int

    def completion(self, events: Iterable[AgentEvent], result: RequestCompleted) -> Json:
        """Build the `chat.completion` object."""
        events = list(events)
        message: Json = {"role": "assistant", "content": result.text, "refusal": None}
        if result.reasoning:
            message["reasoning_content"] = result.reasoning
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

    def event_chunk(self, event: OverviewEvent | TextDelta | ZoomStarted | ZoomFinished) -> Json:
        """Build the `chat.completion.chunk` of an event."""
        match event:
            case TextDelta(_, text, is_answer):
                return self._chunk({"content" if is_answer else "reasoning_content": text})
            case OverviewEvent():
                return self._chunk({"overview": overview_to_dict(event)})
            case ZoomStarted(turn, video, segment, fps):
                return self._chunk({"zooming": {"turn": turn, "video": video, "segment": list(segment), "fps": fps}})
            case ZoomFinished():
                return self._chunk({"zoom": zoom_to_dict(event)})

    def final_chunk(self, result: RequestCompleted, *, answer_streamed: bool) -> Json:
        """Build the chunk that ends the answer.

        Args:
            result: Last event of the request.
            answer_streamed: Text of the answer is already sent, so it is not repeated.
        """
        delta: Json = {} if answer_streamed else {"content": result.text}
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


def _frames(frames: tuple[FrameThumbnail, ...]) -> Json:
    fields: Json = {"pts": [round(frame.pts_s, 3) for frame in frames]}
    if any(frame.image for frame in frames):
        fields["thumbnails"] = [frame.image for frame in frames]
    return fields


def to_api_error(failure: RequestFailed) -> ApiError:
    """Convert a failed request to the error response."""
    return ApiError(failure.http_status, failure.message, code=failure.code)
