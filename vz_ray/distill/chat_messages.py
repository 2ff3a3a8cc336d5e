"""Messages of the chat completion request, and extraction of one turn from the reply."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vz_ray.config.prompt_file import load_prompt_file
from vz_ray.env.chat_format import IMAGE_SLOT
from vz_ray.env.protocols import PromptMessage
from vz_ray.env.zoom_call import ZOOM_CLOSE, ZOOM_OPEN
from vz_ray.video.frame import Frame
from vz_ray.video.image_encoding import encode_image

_BYTES_PER_TOKEN = 2
"""Bytes of text per token. Low, so that estimates are upper bounds."""
_TOKENS_PER_MESSAGE = 16


@dataclass(frozen=True, slots=True)
class TeacherPrompt:
    """Additional instructions for the teacher. They are not part of the recorded episode.

    Attributes:
        system: Appended to the system message.
        turn: Appended to the first message that the teacher replies to.
    """

    system: str = ""
    turn: str = ""

    @classmethod
    def load(cls, path: Path | str) -> TeacherPrompt:
        """Read a prompt file; raise `UserError` if it is missing or has wrong keys."""
        _, values = load_prompt_file(path, cls.__slots__)
        return cls(**values)


def encode_content(
    message: PromptMessage, image_format: str, image_cache: dict[str, str]
) -> str | list[dict[str, Any]]:
    """Encode a message as text, or as interleaved text and image parts.

    Args:
        message: Its text contains `IMAGE_SLOT` for each frame.
        image_format: `jpeg` or `png`.
        image_cache: Encoded images by frame; shared by the turns of an episode.
    """
    if not message.frames:
        return message.text
    parts: list[dict[str, Any]] = []
    for number, text in enumerate(message.text.split(IMAGE_SLOT)):
        parts += [{"type": "text", "text": text}] if text else []
        if number < len(message.frames):
            url = _data_url(message.frames[number], image_format, image_cache)
            parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts


def _data_url(frame: Frame, image_format: str, image_cache: dict[str, str]) -> str:
    key = f"{frame.ref.digest}/{frame.ref.width}"
    if key not in image_cache:
        data = base64.b64encode(encode_image(frame.rgb, image_format)).decode()
        image_cache[key] = f"data:image/{image_format};base64,{data}"
    return image_cache[key]


def estimate_prompt_tokens(messages: Sequence[PromptMessage], tokens_per_image: int) -> int:
    """Estimate an upper bound of the prompt tokens."""
    text_tokens = sum(len(m.text.encode()) // _BYTES_PER_TOKEN + _TOKENS_PER_MESSAGE for m in messages)
    return text_tokens + tokens_per_image * sum(len(m.frames) for m in messages)


def add_teacher_prompt(
    messages: Sequence[PromptMessage], prompt: TeacherPrompt, prefix_turns: int
) -> list[PromptMessage]:
    """Append the teacher prompt to the system message and to the user message after `prefix_turns` turns."""
    extended: list[PromptMessage] = []
    turns = 0
    for message in messages:
        suffix = prompt.system if message.role == "system" else ""
        if message.role == "user" and turns == prefix_turns:
            suffix = prompt.turn
        turns += message.role == "assistant"
        separator = "\n" if suffix and message.role == "system" else ""
        text = message.text + separator + suffix
        extended.append(PromptMessage(message.role, text, message.frames))
    return extended


def truncate_to_one_turn(text: str, finish_reason: str) -> str:
    """Cut after the first `</video_zoom>`; append the tag if the server removed it as a stop string."""
    turn, close, _ = text.partition(ZOOM_CLOSE)
    if close:
        return turn.strip() + close
    is_stop_removed = ZOOM_OPEN in turn and finish_reason == "stop"
    return turn.strip() + (ZOOM_CLOSE if is_stop_removed else "")
