"""OpenAI's chat completion request (`POST /v1/chat/completions`): parse it, and build the agent's task.

Fields have OpenAI's names and meaning. `video_url` parts follow vLLM. Extensions: `vz_ray`, and `pts` of an
image part in a tool message.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vz_ray.config.serve import ServeConfig
from vz_ray.env.task import AnswerType, ChatHistory, Task
from vz_ray.env.trajectory import SamplingParams
from vz_ray.serve.api_errors import invalid_request, validation_error
from vz_ray.serve.client_zoom import ReplayedZoom
from vz_ray.serve.media_resolver import MediaResolver


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
    reasoning: str | None = None
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
    include_reasoning: Literal[True] | None = None
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
        reasoning = message.reasoning or message.reasoning_content or ""
        exchanges.append(ToolExchange(arguments=call.arguments, reasoning=reasoning))
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
    if message.content is None and message.role == "assistant":
        # An earlier reply without an answer.
        return ""
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


async def build_task(conversation: Conversation, media: MediaResolver) -> Task:
    """Resolve the media of a conversation and return the agent's task."""
    videos: list[str] = []
    images: list[str] = []
    for reference in conversation.media:
        if reference.kind == "file":
            resolved = await media.resolve_upload(reference.url, reference.param)
        else:
            resolved = await media.resolve(reference.url, reference.kind, reference.param)
        (videos if resolved.modality == "video" else images).append(resolved.uri)
    return Task(
        task_id="",
        video=videos[0] if videos else "",
        question=conversation.question,
        answer="",
        answer_type=AnswerType.MULTIPLE_CHOICE,
        images=tuple(images),
        extra_videos=tuple(videos[1:]),
        chat_history=ChatHistory(conversation.system, tuple(conversation.history)),
    )


async def resolve_tool_exchange(exchange: ToolExchange, media: MediaResolver) -> ReplayedZoom:
    """Resolve the client's frames in a tool exchange."""
    images = [await media.resolve(frame.url, "image", frame.param) for frame in exchange.frames]
    return ReplayedZoom(
        arguments=exchange.arguments,
        reasoning=exchange.reasoning,
        images=tuple(image.uri for image in images),
        times_s=tuple(frame.pts or 0.0 for frame in exchange.frames),
    )


def sampling_params(body: ChatCompletionRequest, config: ServeConfig) -> SamplingParams:
    """Return the sampling parameters of a request; defaults are those of the server."""
    return SamplingParams(
        temperature=config.temperature if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        max_tokens=body.max_completion_tokens or body.max_tokens or config.episode.max_context,
        seed=body.seed,
    )
