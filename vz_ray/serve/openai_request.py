"""Chat completions: what a request may hold, and what it means.

Field names and their meaning are OpenAI's (`POST /v1/chat/completions`); `video_url` parts are
those of vLLM, and everything of our own is in `vz_ray`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vz_ray.config.serve import ServeConfig
from vz_ray.serve.api_errors import invalid_request, validation_error


class StrictModel(BaseModel):
    """What is not known is an error, not ignored."""

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
    """`pts` is ours: the time of a frame that a tool message shows, seconds."""

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
    """One message; of what clients send back of our replies, only tool calls and their reasoning are read."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=1)] | None = None


class FunctionSpec(BaseModel):
    """A function that the client offers; its description and parameters are the agent's own business."""

    name: Literal["video_zoom"]


class ToolSpec(BaseModel):
    type: Literal["function"]
    function: FunctionSpec


class VzRayOptions(StrictModel):
    """What only this server knows.

    Attributes:
        max_zooms: Fewer zooms than the agent may take; 0 answers from the overview.
        thumbnails: Pixels of the longest side of the pictures sent of frames; 0 sends none.
    """

    max_zooms: Annotated[int, Field(ge=0)] | None = None
    thumbnails: Annotated[int, Field(ge=0, le=1024)] = 0


class StreamOptions(StrictModel):
    include_usage: bool = False


class ChatCompletionRequest(StrictModel):
    """The body of a request. Fields that this server has no use for are accepted at their defaults only."""

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
        """Whether a stream is to end with token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def client_side_zooms(self) -> bool:
        """Whether zooms are returned as tool calls instead of being carried out here."""
        return bool(self.tools) and self.tool_choice != "none"


class MediaReference(BaseModel):
    """A video or picture of a request, not resolved yet.

    Attributes:
        kind: `video`, `image`, or `file` for an upload that says itself which it is.
        url: A URL, a `data:` URI, a path of the server's or the id of an upload.
        param: Where in the request it stands, for messages.
        pts: Of a frame that a tool message shows, seconds.
    """

    kind: Literal["video", "image", "file"]
    url: str
    param: str
    pts: float | None = None


class ToolExchange(BaseModel):
    """A zoom that was returned as a tool call, and what the client said to it.

    Attributes:
        arguments: Of the call, JSON.
        reasoning: Before it.
        frames: That the client shows; none lets the server decode the clip.
    """

    arguments: str
    reasoning: str
    frames: list[MediaReference] = []


class Conversation(BaseModel):
    """What a request asks.

    Attributes:
        question: The last user message.
        system: Every system message.
        history: Question and answer of earlier rounds.
        media: In the order in which they are mentioned.
        tool_exchanges: Tool calls since the question, each with its reply.
    """

    question: str
    system: str
    history: list[tuple[str, str]]
    media: list[MediaReference]
    tool_exchanges: list[ToolExchange]


def parse_conversation(messages: list[ChatMessage], limits: ServeConfig) -> Conversation:
    """Raises `ApiError` where messages are too many or too long, or end with another than a question."""
    if len(messages) > limits.max_messages:
        raise invalid_request(
            f"{len(messages)} messages; at most {limits.max_messages} are read", param="messages"
        )
    media: list[MediaReference] = []
    system: list[str] = []
    rounds: list[tuple[str, str]] = []
    zoomed: list[ToolExchange] = []
    for number, message in enumerate(messages):
        if message.tool_calls or message.role == "tool":
            _add_exchange(
                zoomed, message, number, waiting=bool(number) and bool(messages[number - 1].tool_calls)
            )
            continue
        text = _text(message, f"messages.{number}", media)
        # What was zoomed into for an earlier answer is not shown again.
        zoomed = []
        if message.role in ("system", "developer"):
            system.append(text)
        elif rounds and rounds[-1][0] == message.role:
            rounds[-1] = (message.role, f"{rounds[-1][1]}\n{text}")
        else:
            rounds.append((message.role, text))
    letters = sum(len(text) for text in system) + sum(len(text) for _, text in rounds)
    if letters > limits.max_text_chars:
        raise invalid_request(
            f"{letters} characters; at most {limits.max_text_chars} are read", param="messages"
        )
    if not rounds or rounds[-1][0] != "user":
        raise invalid_request("the last message must be the user's", param="messages")
    if rounds[0][0] != "user":
        raise invalid_request("the first message after the system's must be the user's", param="messages")
    _check_count(media, "video", limits.max_videos)
    _check_count(media, "image", limits.max_images)
    if messages[-1].tool_calls:
        raise invalid_request("the last tool call has no reply", param=f"messages.{len(messages) - 1}")
    past = [(rounds[k][1], rounds[k + 1][1]) for k in range(0, len(rounds) - 1, 2)]
    return Conversation(
        question=rounds[-1][1], system="\n".join(system), history=past, media=media, tool_exchanges=zoomed
    )


def _add_exchange(zoomed: list[ToolExchange], message: ChatMessage, number: int, *, waiting: bool) -> None:
    """Adds a tool call, or the reply to the one before."""
    where = f"messages.{number}"
    if message.tool_calls:
        call = message.tool_calls[0].function
        zoomed.append(ToolExchange(arguments=call.arguments, reasoning=message.reasoning_content or ""))
        return
    if not waiting:
        raise invalid_request("a tool message must follow its tool call", param=where)
    frames = [part for part in message.content or [] if isinstance(part, ImagePart)]
    for place, part in enumerate(frames):
        param = f"{where}.content.{place}"
        if part.pts is None:
            raise invalid_request("a frame needs its time: `pts`, seconds", param=f"{param}.pts")
        zoomed[-1].frames.append(
            MediaReference(kind="image", url=part.image_url.url, param=param, pts=part.pts)
        )


def _text(message: ChatMessage, where: str, media: list[MediaReference]) -> str:
    """The text of a message; its videos and pictures are added to `media`."""
    if message.content is None:
        raise invalid_request("a message needs content", param=f"{where}.content")
    if isinstance(message.content, str):
        return message.content
    words = []
    for number, part in enumerate(message.content):
        param = f"{where}.content.{number}"
        if isinstance(part, TextPart):
            words.append(part.text)
            continue
        if message.role != "user":
            raise invalid_request(f"a message of the {message.role}'s can hold text only", param=param)
        if isinstance(part, VideoPart):
            media.append(MediaReference(kind="video", url=part.video_url.url, param=f"{param}.video_url.url"))
        elif isinstance(part, ImagePart):
            media.append(MediaReference(kind="image", url=part.image_url.url, param=f"{param}.image_url.url"))
        else:
            media.append(MediaReference(kind="file", url=part.file.file_id, param=f"{param}.file.file_id"))
    return "\n".join(words)


def _check_count(media: list[MediaReference], kind: str, most: int) -> None:
    found = sum(one.kind == kind for one in media)
    if found > most:
        raise invalid_request(f"{found} {kind}s; at most {most} can be shown", param="messages")


def parse_model_name(model: str, name: str) -> int | None:
    """The version that `model` asks for; None for whichever is served.

    Example: 3 of `zoomer@3`, None of `zoomer`.

    Raises:
        ApiError: There is no such model.
    """
    base, at, version = model.partition("@")
    if base != name or (at and not version.isdigit()):
        raise invalid_request(
            f"the model {model!r} does not exist; {name!r} does", "model", "model_not_found", 404
        )
    return int(version) if at else None


_UNIONS = frozenset({"str", "list[tagged-union]", "text", "video_url", "image_url", "file"})


def parse_request(body: bytes) -> ChatCompletionRequest:
    """Raises `ApiError` where it is no JSON, or a field is unknown or wrong."""
    try:
        return ChatCompletionRequest.model_validate_json(body)
    except ValidationError as error:
        raise validation_error([_untagged(one) for one in error.errors(include_url=False)]) from None


def _untagged(error: Any) -> dict[str, Any]:
    """pydantic's error with the place as the client wrote it: without the alternatives of a union."""
    place = list(error["loc"])
    kept = [
        part
        for k, part in enumerate(place)
        if not (part in _UNIONS and k and (place[k - 1] == "content" or isinstance(place[k - 1], int)))
    ]
    return {**error, "loc": tuple(kept)}
